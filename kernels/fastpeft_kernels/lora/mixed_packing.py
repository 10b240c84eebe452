"""The adapters of a mixed batch as its products take them, joined by as few operations whatever their number.

With an adapter a row, what each operation costs the host would decide how long a step takes. The scalings are in A, of
which a group has one stack: so S has them, and with it the update and dB = dY^T S; dX = dS A has them; dA = dS^T x is
multiplied by them for the whole group at once.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from .mixed_rows import owners_of, table_on
from .projection import Group, LoraAdapter, Packed


def pack(group: Group) -> Packed:
    """By slot, cast: a (slots, columns of S, in_features), scaled, and b[i] (slots, out_features, columns of projection
    i), each slot's matrix contiguous.

    What an adapter lacks of the columns, and what no adapter serves, is filled up with zeros.
    """
    widths, dtype = group.widths(), group.dtypes.lora
    b: list[Tensor | None] = [None] * len(widths)
    if not any(widths):
        return Packed(None, b, list(b))
    slots = _by_slot(group)
    like = next(adapter.a for projection in group.projections for adapter in projection.adapters)
    with torch.no_grad():
        rows = [piece for own in slots for width, adapter in own for piece in _rows(adapter, width, like)]
        a = _joined(rows, like, like.shape[1]).view(len(slots), sum(widths), like.shape[1])
        for width in dict.fromkeys(filter(None, widths)):
            members = [(i, p.weight.shape[0]) for i, p in enumerate(group.projections) if widths[i] == width]
            columns = [_columns(*own[i], features=features, like=like) for own in slots for i, features in members]
            features = [features for _, features in members]
            stack = _joined(columns, like, width).to(dtype).view(len(slots), sum(features), width)
            for (i, _), part in zip(members, stack.split(features, dim=1), strict=True):
                b[i] = part
        return Packed(scaled(a, group, dtype), b, [None] * len(widths))


def scaled(t: Tensor, group: Group, dtype: torch.dtype, first: int = 0) -> Tensor:
    """t (slots, columns, ..), times the scaling of the adapter that each column from `first` on is of, in `dtype`.

    t may be written over.
    """
    factors = _scalings(group, torch.promote_types(t.dtype, torch.float32))
    if isinstance(factors, Tensor):
        factors = factors[:, first : first + t.shape[1]]
    elif factors == 1.0:
        return t.to(dtype)
    return torch.mul(t, factors, out=t if t.dtype == dtype else t.new_empty(t.shape, dtype=dtype))


def _by_slot(group: Group) -> list[list[tuple[int, LoraAdapter | None]]]:
    """Of each slot and projection: the columns of S, and the adapter that the slot's rows have."""
    widths = group.widths()
    adapters = [{adapter.index: adapter for adapter in projection.adapters} for projection in group.projections]
    return [
        [(width, known.get(owner)) for width, known in zip(widths, adapters, strict=True)]
        for owner in owners_of(group.adapter_index or ())
    ]


def _rows(adapter: LoraAdapter | None, width: int, like: Tensor) -> list[Tensor]:
    """A, and zeros in place of what it has less than `width` rows."""
    rank = 0 if adapter is None else adapter.rank
    filling = [like.new_zeros((width - rank, like.shape[1]))] if rank < width else []
    return filling if adapter is None else [adapter.a, *filling]


def _columns(width: int, adapter: LoraAdapter | None, features: int, like: Tensor) -> Tensor:
    """B, and zeros in place of what it has less than `width` columns."""
    if adapter is None:
        return like.new_zeros((features, width))
    missing = width - adapter.rank
    return torch.nn.functional.pad(adapter.b, (0, missing)) if missing else adapter.b


def _joined(pieces: list[Tensor], like: Tensor, columns: int) -> Tensor:
    """One under the other."""
    return torch.cat(pieces) if pieces else like.new_empty((0, columns))


def _scalings(group: Group, dtype: torch.dtype) -> float | Tensor:
    """One number where every row of every projection has the same, else (slots, columns of S, 1) of `dtype`."""
    widths = group.widths()
    found = [1.0 if a is None else a.scaling for own in _by_slot(group) for width, a in own if width]
    numbers = tuple([1.0 if isinstance(scaling, Tensor) else float(scaling) for scaling in found])
    tensors = [(k, scaling) for k, scaling in enumerate(found) if isinstance(scaling, Tensor)]
    if not tensors and len(set(numbers)) < 2:
        return numbers[0] if numbers else 1.0
    widths = [width for width in widths if width]
    factors = _table(numbers, tuple(widths), dtype, group.projections[0].weight.device)
    if not tensors:
        return factors
    factors, firsts = factors.clone(), list(accumulate(widths, initial=0))
    for k, scaling in tensors:
        slot, i = divmod(k, len(widths))
        factors[slot, firsts[i] : firsts[i + 1]].copy_(scaling.detach())
    return factors


@lru_cache(maxsize=256)
def _table(numbers: tuple[float, ...], widths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(slots, columns, 1) of a number for each slot and projection."""
    columns = [number for k, number in enumerate(numbers) for _ in range(widths[k % len(widths)])]
    return table_on(device, columns, dtype).view(-1, sum(widths), 1)
