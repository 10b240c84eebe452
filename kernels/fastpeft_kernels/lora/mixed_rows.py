"""Whose adapter each row of a mixed batch has, as products take it: groups for batched ones, blocks for our kernels.

What depends on the numbers of a batch alone is made once and kept on the device, without waiting for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from math import ceil

import torch
from torch import Tensor

from ..common.tables import table_on
from .projection import Group


@dataclass(frozen=True, eq=False, slots=True)
class RowGroups:
    """The rows of a batch in groups of equal size, each of one adapter, for the library's batched products.

    Either each row is a group of its own, or a group holds all rows of an adapter, filled up to the most that one has.

    Attributes:
        index: `Group.adapter_index`.
        owners: the distinct numbers in it; an adapter's place here is its slot.
        count: how many groups.
        slots: int64 (count,), each group's slot; None where groups are slots.
        taken: int64, each group's rows in order; None where they lie so.
        empty: int64, the places in `taken` that no row fills, or None.
        places: int64 (rows,), each row's place in `taken`; None with it.
    """

    index: tuple[int, ...]
    owners: tuple[int, ...]
    count: int
    slots: Tensor | None = None
    taken: Tensor | None = None
    empty: Tensor | None = None
    places: Tensor | None = None

    def multiply(self, t: Tensor, stack: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """t (tokens, k), each row by its own matrix of `stack` (slots, k, n), plus bias (n,).

        Returns:
            (tokens, n) in the batch's order; `out` if given.
        """
        return self._product(self._take(t), stack, out, bias)

    def both_gradients(self, dy: Tensor, b: Tensor, s: Tensor, ds: Tensor, dtype: torch.dtype) -> Tensor:
        """Fills ds with dy b, and returns dy^T s by slot, as `outer`."""
        own = self._take(dy)
        self._product(own, b, ds)
        return self._sum(own, self._take(s), dtype)

    def outer(self, t: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum over the rows of each slot of t^T u, (slots, k, n), of t (tokens, k) and u (tokens, n).

        In fp32 at least where `dtype`, the parameter's, is so wide, and where products are added up.
        """
        return self._sum(self._take(t), self._take(u), dtype)

    def _take(self, t: Tensor) -> Tensor:
        """(groups, tokens of a group, features) of t (tokens, features): a view where rows lie so."""
        tokens, features = t.shape
        if self.taken is not None:
            each = tokens // len(self.index)
            t = t.view(len(self.index), each, features).index_select(0, self.taken)
            if self.empty is not None:
                t.index_fill_(0, self.empty, 0.0)
        return t.view(self.count, t.numel() // max(self.count * features, 1), features)

    def _product(self, t: Tensor, stack: Tensor, out: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """`multiply` of what `_take` gave."""
        matrices = stack if self.slots is None else stack.index_select(0, self.slots)
        if out is None or self.taken is not None:
            y = _multiply(t, matrices, bias)
            if self.taken is not None and self.places is not None:
                each = y.shape[1] * self.count // self.taken.shape[0]
                y = y.view(self.taken.shape[0], each, y.shape[2]).index_select(0, self.places)
            y = y.reshape(-1, y.shape[2]) if y.numel() else y.new_empty((y.shape[0] * y.shape[1], y.shape[2]))
            return y if out is None else out.copy_(y)
        _multiply(t, matrices, bias, out.view(*t.shape[:2], out.shape[1]))
        return out

    def _sum(self, t: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
        """`outer` of what `_take` gave."""
        exact = torch.promote_types(t.dtype, torch.float32)
        wide = t.dtype if self.slots is None and dtype.itemsize == t.dtype.itemsize else exact
        if wide == t.dtype:
            product = torch.bmm(t.mT, u)
        elif t.is_cuda:
            product = torch.bmm(t.mT, u, out_dtype=wide)
        else:
            product = torch.bmm(t.mT.to(wide), u.to(wide))
        if self.slots is None:
            return product
        total = product.new_zeros((len(self.owners), *product.shape[1:]))
        if product.is_cuda:  # index_add_ adds in any order there
            return total.index_put_((self.slots,), product, accumulate=True)
        return total.index_add_(0, self.slots, product)


def _multiply(t: Tensor, stack: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.bmm(t, stack, out=out) if bias is None else torch.baddbmm(bias, t, stack, out=out)  # type: ignore[no-any-return]


@lru_cache(maxsize=256)
def owners_of(index: tuple[int, ...]) -> tuple[int, ...]:
    """The distinct numbers of a mixed batch; an adapter's place here is its slot."""
    return tuple(_counts(index))


@lru_cache(maxsize=256)
def slots_of(index: tuple[int, ...]) -> Mapping[int, int]:
    """The slot of each number of `owners_of`."""
    return {owner: slot for slot, owner in enumerate(owners_of(index))}


def row_groups(group: Group, tokens: int) -> RowGroups:
    """The groups of a mixed batch of so many tokens: those for which less is copied, of rows or of adapters."""
    index = group.adapter_index
    assert index is not None
    device = group.projections[0].weight.device
    if _lie_in_order(index):
        return _row_groups(index, True, device)
    counts = _counts(index)
    rank = max(group.widths(), default=0)
    by_adapter = len(counts) * max(counts.values()) * (tokens // len(index)) < len(index) * rank
    return _row_groups(index, by_adapter, device)


@lru_cache(maxsize=256)
def _counts(index: tuple[int, ...]) -> Counter[int]:
    return Counter(index)


def _rows(index: tuple[int, ...]) -> list[list[int]]:
    """Each slot's rows."""
    return [[i for i, other in enumerate(index) if other == owner] for owner in _counts(index)]


@lru_cache(maxsize=256)
def _lie_in_order(index: tuple[int, ...]) -> bool:
    """Whether the rows lie by slots, as many of each: then nothing is copied."""
    rows = _rows(index)
    return [i for own in rows for i in own] == list(range(len(rows) * max(map(len, rows), default=0)))


@lru_cache(maxsize=256)
def _row_groups(index: tuple[int, ...], by_adapter: bool, device: torch.device) -> RowGroups:
    rows, owners = _rows(index), owners_of(index)
    most = max(map(len, rows), default=0)
    if _lie_in_order(index):
        return RowGroups(index, owners, len(owners))
    if not by_adapter:
        return RowGroups(index, owners, len(index), slots=table_on(device, [owners.index(owner) for owner in index]))
    taken = [i for own in rows for i in (*own, *[own[0]] * (most - len(own)))]
    empty = [slot * most + k for slot, own in enumerate(rows) for k in range(len(own), most)]
    place = {i: slot * most + k for slot, own in enumerate(rows) for k, i in enumerate(own)}
    return RowGroups(
        index, owners, len(owners), taken=table_on(device, taken), empty=table_on(device, empty) if empty else None,
        places=table_on(device, [place[i] for i in range(len(index))]),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RowSlots:
    """The rows of a batch, for kernels of which each program reads one adapter.

    Attributes:
        index: `Group.adapter_index`.
        each: tokens of a row.
    """

    index: tuple[int, ...]
    each: int

    @property
    def count(self) -> int:
        """Of slots."""
        return len(owners_of(self.index))

    def blocks(self, block_m: int, device: torch.device) -> Tensor:
        """int32 (blocks, 3): each block's first token, its end, and its slot, by which they are sorted.

        No block has tokens of two adapters, nor more than `block_m`.
        """
        return _blocks(self.index, self.each, block_m, block_m, device)[0]

    def splits(self, tokens: int, block_m: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """How sums over each slot's tokens are split, in parts of at most half more than `tokens`, a multiple of
        `block_m`.

        Returns:
            (splits, starts): as `blocks`; int32 (slots + 1), each slot's first split, and the number of all.
        """
        most = (tokens + tokens // 2) // block_m * block_m
        return _blocks(self.index, self.each, most, block_m, device)


def row_slots(group: Group, tokens: int) -> RowSlots:
    """Of a mixed batch of so many tokens."""
    assert group.adapter_index is not None
    return RowSlots(group.adapter_index, tokens // max(len(group.adapter_index), 1))


@lru_cache(maxsize=256)
def _blocks(index: tuple[int, ...], each: int, most: int, multiple: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Blocks of at most `most` tokens, about equal, and each slot's first one and their number."""
    owners, first = owners_of(index), 0
    found: list[list[tuple[int, int, int]]] = [[] for _ in owners]
    for owner, rows in groupby(index):  # adjacent rows of an adapter lie together
        slot, end = owners.index(owner), first + each * len(list(rows))
        size = multiple * ceil((end - first) / multiple / max(ceil((end - first) / most), 1))
        found[slot] += [(at, min(at + size, end), slot) for at in range(first, end, max(size, 1))]
        first = end
    starts = list(accumulate(map(len, found), initial=0))
    return table_on(device, [line for lines in found for line in lines], torch.int32), table_on(
        device, starts, torch.int32
    )


@lru_cache(maxsize=256)
def rows_with(index: tuple[int, ...], owners: tuple[int, ...], device: torch.device) -> Tensor:
    """int64, the rows whose number is one of `owners`."""
    return table_on(device, [i for i, owner in enumerate(index) if owner in owners])


@lru_cache(maxsize=64)
def rows_by_owner(index: tuple[int, ...], device: torch.device) -> tuple[tuple[int, ...], tuple[Tensor, ...], Tensor]:
    """(owners, rows, places) of `Group.adapter_index`: the distinct numbers, each one's rows, and where each row stands
    when these lie one after the other; int64."""
    rows = _rows(index)
    order = [i for own in rows for i in own]
    places = sorted(range(len(order)), key=order.__getitem__)
    return owners_of(index), tuple(table_on(device, own) for own in rows), table_on(device, places)
