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

from ..common.tables import table_on
from . import mixed_native
from .mixed_rows import owners_of
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
    adapters = [adapter for projection in group.projections for adapter in projection.adapters]
    if (native := mixed_native.owned(group)) is not None:
        a, b = native.pack([each.a for each in adapters], [each.b for each in adapters], scalings(group), dtype)
        return Packed(a, b, [None] * len(widths))
    slots, like = _by_slot(group), adapters[0].a
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
    number, table = scalings(group)
    if table is None and number == 1.0:
        return t.to(dtype)
    wide = torch.promote_types(t.dtype, torch.float32)
    factors = number if table is None else table[:, first : first + t.shape[1]].to(wide)
    return torch.mul(t, factors, out=t if t.dtype == dtype else t.new_empty(t.shape, dtype=dtype))


def scalings(group: Group) -> tuple[float, Tensor | None]:
    """(number, table): the number where every row of every projection has the same, else a table (slots, columns of S,
    1), of fp64 where anything of the adapters is and else of fp32."""
    adapters = [adapter for projection in group.projections for adapter in projection.adapters]
    given = {adapter.scaling for adapter in adapters}
    alike = next(iter(given)) if len(given) == 1 else None
    if isinstance(alike, (int, float)) and _complete(group.adapter_index or (), group.numbers()):
        return float(alike), None
    widths = tuple([width for width in group.widths() if width])
    device = group.projections[0].weight.device
    found = [1.0 if a is None else a.scaling_on(device) for own in _by_slot(group) for width, a in own if width]
    tensors = [(k, scaling) for k, scaling in enumerate(found) if isinstance(scaling, Tensor)]
    numbers = [1.0 if isinstance(scaling, Tensor) else scaling for scaling in found]
    if not tensors and len(set(numbers)) < 2:
        return (numbers[0] if numbers else 1.0), None
    wide = torch.float64 in {group.dtypes.lora, *[adapter.a.dtype for adapter in adapters]}
    table = _table(tuple(numbers), widths, torch.float64 if wide else torch.float32, device)
    if tensors:
        table, firsts = table.clone(), list(accumulate(widths, initial=0))
        for k, scaling in tensors:
            slot, i = divmod(k, len(widths))
            table[slot, firsts[i] : firsts[i + 1]].copy_(scaling)
    return 1.0, table


def _by_slot(group: Group) -> list[list[tuple[int, LoraAdapter | None]]]:
    """Of each slot and projection: the columns of S, and the adapter that the slot's rows have."""
    widths = group.widths()
    adapters = [{adapter.index: adapter for adapter in projection.adapters} for projection in group.projections]
    return [
        [(width, known.get(owner)) for width, known in zip(widths, adapters, strict=True)]
        for owner in owners_of(group.adapter_index or ())
    ]


@lru_cache(maxsize=256)
def _complete(index: tuple[int, ...], numbers: tuple[tuple[int, ...], ...]) -> bool:
    """Whether rows of every slot have an adapter wherever any has, and no adapter is without rows."""
    owners = {*index}
    return all([owners == {*own} for own in numbers if own])


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


@lru_cache(maxsize=256)
def _table(numbers: tuple[float, ...], widths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(slots, columns, 1) of a number for each slot and projection."""
    columns = [number for k, number in enumerate(numbers) for _ in range(widths[k % len(widths)])]
    return table_on(device, columns, dtype).view(-1, sum(widths), 1)
