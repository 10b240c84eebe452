"""What the ops are asked under torch.compile and selective checkpointing: nothing may change."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastpeft_kernels.lora import Dtypes

F32 = Dtypes(torch.float32, torch.float32, torch.float32)
BF16 = Dtypes(torch.bfloat16, torch.bfloat16, torch.bfloat16)
F32_ON_BF16 = Dtypes(torch.bfloat16, torch.float32, torch.bfloat16)


def check_one_graph(
    function: Callable[[Tensor], tuple[Tensor, ...]],
    x: Tensor,
    parameters: Sequence[Tensor],
    backend: str,
    roundings: int = 0,
) -> None:
    """Compiled to one graph, outputs and the gradients of x and `parameters` are the very same.

    Args:
        roundings: of fp32 numbers about 1 in size, by which they may differ where the compiler fuses
            PyTorch's operations.
    """
    near = roundings * torch.finfo(torch.float32).eps
    eager, traced = function(x), torch.compile(function, fullgraph=True, backend=backend)(x)
    wanted = [x, *parameters]
    dys = [torch.randn_like(y) for y in eager]
    torch.testing.assert_close(traced, eager, rtol=near, atol=near)
    torch.testing.assert_close(
        torch.autograd.grad(traced, wanted, dys), torch.autograd.grad(eager, wanted, dys), rtol=near, atol=near
    )


def check_changing_sizes(function: Callable[[Tensor], Any]) -> None:
    """One graph for inputs of 64 features, however many rows they have."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 5, 64), (2, 9, 64)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), function(x))


def check_selective_checkpointing(
    block: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor], saved: str
) -> None:
    """The gradients of x and `parameters` where the results of `saved` (an op of aten, or "everything") are kept."""

    def policy(context: Any, called: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if saved in (str(called).removeprefix("aten."), "everything"):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    wanted = [x, *parameters]
    expected = torch.autograd.grad(block(x).sum(), wanted)
    y = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), wanted), expected)
