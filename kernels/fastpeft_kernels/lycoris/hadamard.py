"""LoHa: weight and updates are summed into one matrix first, for one product in place of one for each.

Three products of the weight's size, forward and backward, where one product for each takes five. The matrix is made
again in backward, of products that the gradients of the factors need there in any case.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.scratch import scratch
from ..weights import FrozenWeight
from .adapters import LohaAdapter


def forward(x: Tensor, weight: FrozenWeight, bias: Tensor | None, adapters: Sequence[LohaAdapter]) -> Tensor:
    """(tokens, out_features) for x (tokens, in_features); all in the dtype of x, which no one may write into."""
    return _linear(x, _summed(weight, adapters, [_pair(adapter) for adapter in adapters], x), bias)


def backward(
    dy: Tensor, x: Tensor | None, weight: FrozenWeight, adapters: Sequence[LohaAdapter], needs_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """(dx, gradients of all factors in order); no gradients of factors without x."""
    pairs = [_pair(adapter) for adapter in adapters]
    dx = _linear(dy, _summed(weight, adapters, pairs, dy).t()) if needs_dx else None
    grads: list[Tensor] = []
    if x is None:
        return dx, grads
    dw = torch.mm(dy.t(), x, out=scratch(weight.shape, dy.dtype, dy.device))
    for adapter, (first, second) in zip(adapters, pairs, strict=True):
        w1_a, w1_b, w2_a, w2_b = adapter.factors
        d_first, d_second = second.mul_(dw).mul_(adapter.scaling), first.mul_(dw).mul_(adapter.scaling)
        grads += [d_first @ w1_b.t(), w1_a.t() @ d_first, d_second @ w2_b.t(), w2_a.t() @ d_second]
    return dx, grads


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x matrix^T + bias; on a GPU in fp32 from sums of 512 terms.

    cuBLAS may add a fp32 product's terms one after the other. A sum of terms of weight and updates at once then errs
    more than the separate products that it stands for; in pieces it errs less.
    """
    step = 512 if x.is_cuda and x.dtype == torch.float32 else max(1, x.shape[1])
    y = torch.nn.functional.linear(x[:, :step], matrix[:, :step], bias)
    for first in range(step, x.shape[1], step):
        y.addmm_(x[:, first : first + step], matrix[:, first : first + step].t())
    return y


def _pair(adapter: LohaAdapter) -> tuple[Tensor, Tensor]:
    return adapter.w1_a @ adapter.w1_b, adapter.w2_a @ adapter.w2_b


def _summed(
    weight: FrozenWeight, adapters: Sequence[LohaAdapter], pairs: Sequence[tuple[Tensor, Tensor]], like: Tensor
) -> Tensor:
    """Weight plus updates, in the warm buffer that the next product overwrites."""
    total = weight.decode(out=scratch(weight.shape, like.dtype, like.device))
    for adapter, (first, second) in zip(adapters, pairs, strict=True):
        total.addcmul_(first, second, value=adapter.scaling)
    return total
