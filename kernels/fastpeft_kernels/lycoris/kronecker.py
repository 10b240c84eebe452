"""LoKr: x kron(w1, w2)^T without the Kronecker product, as w1 X w2^T for each token's x, laid out as a matrix X.

Its cost is in_features out_k + out_features in_m multiplications a token, a sixteenth of the frozen product's for 1024
features in factors of 32. X w2^T is made again in backward: only x is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..lora.parts import decoded
from ..weights import FrozenWeight
from .adapters import LokrAdapter

_SPAN = 128


def forward(x: Tensor, weight: FrozenWeight, bias: Tensor | None, adapters: Sequence[LokrAdapter]) -> Tensor:
    """(tokens, out_features) for x (tokens, in_features), contiguous; all in the dtype of x."""
    y = torch.nn.functional.linear(x, decoded(weight, x.dtype), bias)
    for w1, w2, scaling in adapters:
        y.view(len(y), w1.shape[0], w2.shape[0]).baddbmm_((w1 * scaling).expand(len(y), *w1.shape), _inner(x, w1, w2))
    return y


def backward(
    dy: Tensor, x: Tensor | None, weight: FrozenWeight, adapters: Sequence[LokrAdapter], needs_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """(dx, gradients of all factors in order) for dy (tokens, out_features), contiguous; none of factors without x."""
    dx = torch.mm(dy, decoded(weight, dy.dtype)) if needs_dx else None
    grads: list[Tensor] = []
    for w1, w2, scaling in adapters:
        dy_rows = dy.view(len(dy), w1.shape[0], w2.shape[0])
        dz = torch.bmm((w1 * scaling).t().expand(len(dy), *w1.t().shape), dy_rows).view(-1, w2.shape[0])
        if dx is not None:
            dx.view(-1, w2.shape[1]).addmm_(dz, w2)
        if x is not None:
            by_row = [t.transpose(1, 2).reshape(-1, t.shape[1]) for t in (dy_rows, _inner(x, w1, w2))]
            grads += [_summed(*by_row) * scaling, _summed(dz, x.view(-1, w2.shape[1]))]
    return dx, grads


def _summed(a: Tensor, b: Tensor) -> Tensor:
    """a^T b for many rows, a few hundred at a time: what a sum loses to rounding grows with its length."""
    parts = len(a) // _SPAN
    if parts < 2:
        return torch.mm(a.t(), b)
    last = parts * _SPAN
    sums = torch.bmm(a[:last].view(parts, _SPAN, -1).transpose(1, 2), b[:last].view(parts, _SPAN, -1))
    return torch.addmm(sums.sum(0), a[last:].t(), b[last:])


def _inner(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """X w2^T of each token, (tokens, in_m, out_k)."""
    return torch.mm(x.view(-1, w2.shape[1]), w2.t()).view(len(x), w1.shape[1], w2.shape[0])
