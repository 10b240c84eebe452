"""What torch's FlopCounterMode counts for the ops of `custom_op`; registered by the import."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .layout import unflatten_group
from .projection import LoraProjection


@register_flop_formula(torch.ops.fastpeft.lora_group, get_raw=True)
def _forward_flops(x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float], layout: str, **_: Any) -> int:
    group = unflatten_group(tensors, numbers, layout)
    return 2 * prod(x.shape[:-1]) * sum(_multiplications(p, 1, p.rank, p.rank) for p in group.projections)


@register_flop_formula(torch.ops.fastpeft.lora_group_backward, get_raw=True)
def _backward_flops(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    s: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    layout: str,
    dx_dtype: torch.dtype | None,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    group, total = unflatten_group(tensors, numbers, layout), 0
    for projection, flags, dy in zip(group.projections, group.flags(wanted), dys, strict=True):
        if dy is None:
            continue
        ranks = [adapter.rank for adapter in projection.adapters]
        trained_a = sum(rank for rank, flag in zip(ranks, flags[1::3], strict=True) if flag)
        trained_b = sum(ranks) if any(flags[2::3]) else 0
        dx = dx_dtype is not None
        total += _multiplications(projection, dx, dx * projection.rank + trained_a, projection.rank + trained_b)
    return 2 * prod(next(dy.shape[:-1] for dy in dys if dy is not None)) * total


def _multiplications(projection: LoraProjection, frozen: int, down: int, up: int) -> int:
    """A token's: `frozen` products with W, `down` rows of width in_features, `up` rows of width out_features."""
    out_features, in_features = projection.weight.shape
    return frozen * out_features * in_features + down * in_features + up * out_features
