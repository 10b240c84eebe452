"""Experts in plain PyTorch, differentiable by autograd: the oracle, and what the ops compute by definition."""

from __future__ import annotations

import torch
from torch import Tensor

from .structure import ExpertProjection, Experts


def grouped_lora_linear_reference(
    x: Tensor, counts: Tensor, projection: ExpertProjection, dtype: torch.dtype
) -> Tensor:
    """(rows, out_features) in `dtype`, for x (rows, in_features) sorted by expert, of which each has `counts`."""
    parts = x.to(dtype).split(counts.tolist())
    return torch.cat([_linear(part, projection, expert, dtype) for expert, part in enumerate(parts)])


def lora_experts_reference(x: Tensor, index: Tensor, weights: Tensor, experts: Experts, dtype: torch.dtype) -> Tensor:
    """The sum over a token's experts of weights * down(gating(inner(x))), (tokens, in_features) in x's dtype."""
    y = x.new_zeros(x.shape, dtype=torch.promote_types(dtype, weights.dtype))
    for expert in index.unique().tolist() or [0]:  # one at least, so that all is differentiable
        tokens, choices = torch.where(index == expert)
        h = experts.gating.reference(_linear(x[tokens].to(dtype), experts.inner, expert, dtype))
        part = _linear(h, experts.down, expert, dtype) * weights[tokens, choices, None]
        y = y.index_add(0, tokens, part.to(y.dtype))
    return y.to(x.dtype)


def _linear(x: Tensor, projection: ExpertProjection, expert: int, dtype: torch.dtype) -> Tensor:
    rows = projection.weight.shape[0] // projection.experts
    matrix = projection.weight.decode(rows=(expert * rows, (expert + 1) * rows), dtype=dtype)
    y = x @ (matrix if projection.transposed else matrix.t())
    for adapter in projection.adapters:
        y = y + (x @ adapter.a[expert].to(dtype).t()) @ adapter.b[expert].to(dtype).t() * adapter.scaling
    return y if projection.bias is None else y + projection.bias[expert].to(dtype)
