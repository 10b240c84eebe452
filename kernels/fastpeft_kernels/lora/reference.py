"""LoRA projections in plain PyTorch, differentiable by autograd: the oracle, and what the ops compute by definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.random import dropped
from .projection import Dtypes, LoraProjection


def lora_group_reference(
    x: Tensor,
    projections: Sequence[LoraProjection],
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
    adapter_index: Sequence[int] | None = None,
) -> tuple[Tensor, ...]:
    """Every projection of x: x W^T + bias + sum over adapters of scaling * (dropout(x) A^T B^T + bias_B).

    With a magnitude it is DoRA, as PEFT computes it: x W^T + bias + (gain - 1) * dropout(x) W^T
    + gain * scaling * dropout(x) A^T B^T, gain = magnitude / norms of the rows of W + scaling B A, which are constants.

    Args:
        x: (..., in_features).
        projections: what to compute; see `LoraProjection`.
        dtypes: of the frozen product, of the adapters' products, and of the results.
        seeds: one int64 tensor of shape (1,) for each projection with dropout, None for the others.
        adapter_index: as `Group.adapter_index`, for x (rows, ..., in_features); the adapters of a projection then share
            its random numbers.

    Returns:
        One tensor (..., out_features) of dtype `dtypes.out` for each projection.
    """
    results = []
    for projection, seed in zip(projections, seeds, strict=True):
        bias = None if projection.bias is None else projection.bias.to(dtypes.compute)
        weight = projection.weight.decode(dtype=dtypes.compute)
        y = F.linear(x.to(dtypes.compute), weight, bias)
        gain = None if projection.magnitude is None else _gain(projection, dtypes.lora)
        for stream, adapter in enumerate(projection.adapters):
            inputs = x.to(dtypes.lora)
            if adapter.dropout > 0.0 and seed is not None:
                inputs = dropped(inputs, seed, adapter.dropout, stream if adapter_index is None else 0)
            bias = None if adapter.bias is None else adapter.bias.to(dtypes.lora)
            update = F.linear(F.linear(inputs, adapter.a.to(dtypes.lora)), adapter.b.to(dtypes.lora), bias)
            if adapter_index is not None:
                own = [number == adapter.index for number in adapter_index]
                rows = torch.tensor(own, dtype=torch.bool, device=x.device).view(x.shape[0], *[1] * (x.dim() - 1))
                update = torch.where(rows, update, 0.0)
            if gain is not None:
                y = y + (gain - 1) * F.linear(inputs.to(dtypes.compute), weight)
                update = gain * update
            y = y + update * adapter.scaling
        results.append(y.to(dtypes.out))
    return tuple(results)


def _gain(projection: LoraProjection, dtype: torch.dtype) -> Tensor:
    """(out_features,) in the wider of the magnitude's dtype and `dtype`, in which the norms are made."""
    (adapter,), magnitude = projection.adapters, projection.magnitude
    assert magnitude is not None
    update = (adapter.b.detach().to(dtype) @ adapter.a.detach().to(dtype)) * adapter.scaling
    norms = torch.linalg.vector_norm(projection.weight.decode(dtype=dtype) + update, dim=1)
    return magnitude.to(torch.promote_types(magnitude.dtype, dtype)) / norms
