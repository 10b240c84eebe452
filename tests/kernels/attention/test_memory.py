"""Memory grows with the number of tokens, not with its square."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpeft_kernels.attention import Mask, attention, blocks, packed

from .drawn import make_case

EXTRAS = ["softcap", "relative", "sinks", "dropout"]


class Largest(TorchDispatchMode):
    """Elements of the largest result of any operation that has memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return results


def largest(tokens: int, mask: Mask, extras: list[str], **more: Any) -> int:
    case = make_case(batch=1, heads=2, kv_heads=1, queries=tokens, keys=tokens, mask=mask, extras=extras)
    with Largest() as found:
        attention(case.q, case.k, case.v, **case.arguments(), **more).sum().backward()
    return found.elements


@pytest.mark.parametrize("extras", ([], EXTRAS))
@pytest.mark.parametrize("kind", ("all", "packed"))
def test_blocks_are_the_largest(kind: str, extras: list[str], small_blocks: None) -> None:
    for tokens in (64, 128):
        cu_seqlens = torch.tensor([0, 10, 50, tokens])
        mask = packed(cu_seqlens, tokens) if kind == "packed" else Mask(right=0)
        per_token = 2 * 16  # q, of which no operation gives more
        assert largest(tokens, mask, extras, backend="blockwise") <= max(2 * 16 * 24, per_token * tokens)


@pytest.mark.parametrize("mask", (Mask(), Mask(right=0), Mask(left=40, right=0), Mask(keys=torch.ones(1, 512) > 0)))
def test_what_is_chosen_by_itself(mask: Mask) -> None:
    block = blocks.CPU.scores
    assert 2 * block < 2 * 512 * 512
    assert largest(512, mask, []) <= block


def test_what_is_kept_for_backward() -> None:
    case = make_case(batch=1, queries=64, keys=64, extras=EXTRAS, mask=Mask(right=0))
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(case.q, case.k, case.v, **case.arguments(), backend="blockwise")
    q_and_out, k_and_v, lse = 2 * 4 * 64 * 16, 2 * 2 * 64 * 16, 4 * 64
    assert sum(kept.values()) == q_and_out + k_and_v + lse + 4 * (64 + 64 - 1) + 4 + 1
