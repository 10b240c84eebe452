"""Gated activations by PyTorch's operations: in fp32, rounded once, a piece of the rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .reference import gated_activation_reference

_PIECE = 1 << 20  # elements, which bounds the temporaries
_QUICK = 1.702
_aten = torch.ops.aten


def _quick_gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(_QUICK * x)
    return grad * (sigmoid + x * (_QUICK * (sigmoid * (1.0 - sigmoid))))


# From the gradient of act(x) and x, the gradient of x.
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _aten.silu_backward.default,
    "gelu": lambda grad, x: _aten.gelu_backward.default(grad, x),
    "gelu_tanh": lambda grad, x: _aten.gelu_backward.default(grad, x, approximate="tanh"),
    "relu": lambda grad, x: _aten.threshold_backward.default(grad, x, 0),
    "quick_gelu": _quick_gelu_backward,
    "relu2": lambda grad, x: _aten.threshold_backward.default(grad * (2.0 * x), x, 0),
}


@torch.no_grad()
def gated_activation_library(gate: Tensor | None, up: Tensor, kind: str, h: Tensor) -> None:
    """Fill `h`, as `api.gated_activation` says."""
    for piece in pieces(up):
        x = None if gate is None else wide(gate[piece])
        h[piece].copy_(gated_activation_reference(x, wide(up[piece]), kind))


@torch.no_grad()
def gated_activation_backward_library(
    dh: Tensor, gate: Tensor | None, up: Tensor, kind: str, dgate: Tensor | None, dup: Tensor, h: Tensor | None
) -> None:
    """Fill `dgate`, `dup` and `h`, as `api.gated_activation_backward` says."""
    for piece in pieces(up):
        grad, factor = wide(dh[piece]), wide(up[piece])
        x = factor if gate is None else wide(gate[piece])
        # All is computed before anything is written: a result may be the tensor of an input.
        value = gated_activation_reference(None, x, kind)
        dx = _BACKWARD[kind](grad if gate is None else grad * factor, x)
        product = value if gate is None else value * factor
        if dgate is None:
            dup[piece].copy_(dx)
        else:
            dfactor = grad * value
            dgate[piece].copy_(dx)
            dup[piece].copy_(dfactor)
        if h is not None:
            h[piece].copy_(product)


def pieces(like: Tensor) -> Iterator[slice]:
    rows, columns = like.shape
    step = max(1, _PIECE // max(1, columns))
    return (slice(row, row + step) for row in range(0, rows, step))


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
