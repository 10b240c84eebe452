"""Times on a CUDA GPU: rotary embeddings beside what they replace, as a share of a copy's bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.gpu_clock import median_us
from .api import run_rotary
from .reference import rotary_reference
from .rotation import Rotation

_DEVICE = torch.device("cuda")
# batch, heads of q and of k, tokens, dim: Llama 3.1 8B and Llama 2 13B with 8192 tokens
_SHAPES = ((2, 32, 8, 4096, 128), (4, 40, 40, 2048, 128))


def speed_checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named measurements, in microseconds; shares are of the bandwidth of a copy of as many bytes."""
    for shape in _SHAPES:
        for layout in ("halved", "interleaved"):
            yield f"speed {layout} {'x'.join(map(str, shape))} bf16", partial(_measure, shape, layout)


def _measure(shape: tuple[int, ...], layout: str) -> dict[str, Any]:
    batch, q_heads, k_heads, tokens, dim = shape
    q, k, dq, dk = (
        torch.randn((batch, tokens, heads, dim), device=_DEVICE, dtype=torch.bfloat16).transpose(1, 2)
        for heads in (q_heads, k_heads, q_heads, k_heads)
    )
    cos, sin = (torch.randn((1, tokens, dim), device=_DEVICE, dtype=torch.bfloat16) for _ in range(2))
    q.requires_grad_()
    k.requires_grad_()
    source = torch.empty(q.numel() + k.numel(), dtype=torch.bfloat16, device=_DEVICE)
    target = torch.empty_like(source)
    copy = median_us(lambda: target.copy_(source))
    figures: dict[str, Any] = {"copy_us": copy}
    for name, way in _ways(layout, cos, sin).items():
        try:
            outs = way(q, k)
            forward = median_us(partial(_forward, way, q, k))
            backward = median_us(partial(torch.autograd.grad, outs, [q, k], [dq, dk], retain_graph=True))
        except Exception as error:  # a rival's failure is not ours, and is said
            if name == "triton":
                raise
            figures[f"{name}_error"] = f"{type(error).__name__}: {error}"[:200]
            continue
        figures |= {f"{name}_forward_us": forward, f"{name}_forward_share": copy / forward}
        figures |= {f"{name}_backward_us": backward, f"{name}_backward_share": copy / backward}
    return figures


def _ways(layout: str, cos: Tensor, sin: Tensor) -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """What turns q and k, by name."""
    rotation = Rotation(layout, "each", torch.bfloat16)

    def own(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_reference(q, k, cos, sin, rotation)

    ways: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
        "triton": lambda q, k: run_rotary(q, k, cos, sin, rotation, "triton"),
        "model": own,
        "compiled": torch.compile(own),
    }
    if layout == "halved":
        try:
            from liger_kernel.ops.rope import LigerRopeFunction
        except ImportError:
            return ways

        def liger(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:  # it writes into what it is given
            return LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)  # type: ignore[no-any-return, no-untyped-call]

        ways["liger_on_a_copy"] = liger
    return ways


@torch.no_grad()
def _forward(way: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return way(q, k)
