"""What both implementations of a group need beside their products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..common.scratch import scratch
from ..weights import FrozenWeight
from .projection import LoraProjection, Packed


def decoded(weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """The dense values for one product, in a warm buffer that the next decode overwrites unless they lie ready."""
    ready = weight.ready(dtype)
    if ready is not None:
        return ready
    if not weight.fills:
        return weight.decode(dtype=dtype)
    return weight.decode(out=scratch(weight.shape, dtype, weight.device))


def empty_ds(dys: Sequence[Tensor | None], packed: Packed) -> Tensor | None:
    """Room for dS; zeros where an output without gradient leaves its columns unwritten."""
    given = [dy for dy in dys if dy is not None]
    if packed.a is None or not given:
        return None
    shape = (given[0].shape[0], packed.a.shape[0])
    return packed.a.new_empty(shape) if len(given) == len(dys) else packed.a.new_zeros(shape)


def bias_gradients(dy: Tensor, projection: LoraProjection, needs: Sequence[bool], grads: list[Tensor | None]) -> None:
    """Of the projection's bias and of its adapters', from one sum over the tokens."""
    biases = [(projection.bias, 1.0), *((adapter.bias, adapter.scaling) for adapter in projection.adapters)]
    total: Tensor | None = None
    for i, (bias, factor) in enumerate(biases):
        if needs[3 * i] and bias is not None:
            if total is None:
                total = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
            grads[3 * i] = (total * factor).to(bias.dtype)


def adapter_columns(
    projections: Sequence[LoraProjection], seeds: Sequence[Tensor | None]
) -> Iterator[tuple[int, int, Tensor | None, float, int]]:
    """(first, last, seed or None, p, stream) of every adapter's columns of S."""
    last = 0
    for projection, seed in zip(projections, seeds, strict=True):
        for stream, adapter in enumerate(projection.adapters):
            first, last = last, last + adapter.rank
            yield first, last, seed if adapter.dropout > 0.0 else None, adapter.dropout, stream
