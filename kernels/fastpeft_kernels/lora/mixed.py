"""Mixed batches: each row of a batch has an adapter of its own, and reads no other.

Rows are multiplied in groups of one adapter each by one batched product. In S = x A^T, dS and the products a projection
has as many columns as its largest adapter; adapters of lower rank are filled up with zeros, and rows without an adapter
meet zeros alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..common.random import dropout
from ..common.validation import check_instance
from .projection import Group, LoraAdapter, LoraProjection, Packed, trains_a


@dataclass(frozen=True, eq=False, slots=True)
class RowGroups:
    """The rows of a batch in groups of equal size, each of one adapter.

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

    def take(self, t: Tensor) -> Tensor:
        """(groups, tokens of a group, features) of t (tokens, features): a view where rows lie so."""
        tokens, features = t.shape
        if self.taken is not None:
            each = tokens // len(self.index)
            t = t.view(len(self.index), each, features).index_select(0, self.taken)
            if self.empty is not None:
                t.index_fill_(0, self.empty, 0.0)
        return t.view(self.count, t.numel() // max(self.count * features, 1), features)

    def product(self, t: Tensor, stack: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """t (groups, tokens of a group, k), each row by its own matrix of `stack` (slots, k, n), plus bias (n,).

        Returns:
            (tokens, n) in the batch's order; `out` if given.
        """
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

    def outer(self, t: Tensor, u: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum over the rows of each slot of t^T u, (slots, k, n), of `take`n t (.., k) and u (.., n).

        In fp32 at least where `dtype`, the parameter's, is so wide, and where products are added up.
        """
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

    def slot(self, adapter: LoraAdapter) -> int | None:
        """Of an adapter's rows; None where no row has it."""
        return self.owners.index(adapter.index) if adapter.index in self.owners else None


def _multiply(t: Tensor, stack: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.bmm(t, stack, out=out) if bias is None else torch.baddbmm(bias, t, stack, out=out)  # type: ignore[no-any-return]


def row_groups(group: Group, tokens: int) -> RowGroups:
    """The groups of a mixed batch of so many tokens: those for which less is copied, of rows or of adapters."""
    index = group.adapter_index
    assert index is not None
    counts = _counts(index)
    most = max(counts.values(), default=0)
    rank = max(group.widths(), default=0)
    by_adapter = len(counts) * most * (tokens // max(len(index), 1)) < len(index) * rank
    return _row_groups(index, by_adapter, group.projections[0].weight.device)


@lru_cache(maxsize=256)
def _counts(index: tuple[int, ...]) -> Counter[int]:
    return Counter(index)


@lru_cache(maxsize=256)
def _row_groups(index: tuple[int, ...], by_adapter: bool, device: torch.device) -> RowGroups:
    rows = {owner: [i for i, other in enumerate(index) if other == owner] for owner in _counts(index)}
    owners, most = tuple(rows), max(map(len, rows.values()), default=0)
    lying = [i for own in rows.values() for i in own] == list(range(len(owners) * most))
    if lying:  # nothing is copied
        return RowGroups(index, owners, len(owners))
    if not by_adapter:
        return RowGroups(index, owners, len(index), slots=_on(device, [owners.index(owner) for owner in index]))
    taken = [i for own in rows.values() for i in (*own, *[own[0]] * (most - len(own)))]
    empty = [slot * most + k for slot, own in enumerate(rows.values()) for k in range(len(own), most)]
    place = {i: slot * most + k for slot, own in enumerate(rows.values()) for k, i in enumerate(own)}
    return RowGroups(
        index, owners, len(owners), taken=_on(device, taken), empty=_on(device, empty) if empty else None,
        places=_on(device, [place[i] for i in range(len(index))]),
    )  # fmt: skip


def _on(device: torch.device, numbers: list[int]) -> Tensor:
    """Without waiting for a GPU."""
    with torch.inference_mode(False):
        values = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def pack(group: Group) -> Packed:
    """The adapters of a mixed batch, cast and scaled, by slot: a (slots, columns of S, in_features), b[i] (slots,
    out_features, columns of projection i)."""
    owners, widths, dtype = tuple(_counts(group.adapter_index or ())), group.widths(), group.dtypes.lora
    bias: list[Tensor | None] = [None] * len(widths)
    if not any(widths):
        return Packed(None, list(bias), bias)
    device, in_features = group.projections[0].weight.device, group.projections[0].weight.shape[1]
    full = all(
        sorted(adapter.index for adapter in p.adapters if adapter.rank == width) == sorted(owners) or not width
        for p, width in zip(group.projections, widths, strict=True)
    )
    make = torch.empty if full else torch.zeros
    down = make((len(owners), sum(widths), in_features), dtype=dtype, device=device)
    ups: list[Tensor | None] = []
    places, used, column = list[Tensor](), list[LoraAdapter](), 0
    for projection, width in zip(group.projections, widths, strict=True):
        up = make((len(owners), projection.weight.shape[0], width), dtype=dtype, device=device) if width else None
        for adapter in projection.adapters:
            if up is not None and adapter.index in owners:
                slot = owners.index(adapter.index)
                places += (down[slot, column : column + adapter.rank], up[slot, :, : adapter.rank])
                used.append(adapter)
        ups.append(up)
        column += width
    if used:
        up_values = _scaled([adapter.b.detach() for adapter in used], used)
        pairs = zip([adapter.a.detach() for adapter in used], up_values, strict=True)
        torch._foreach_copy_(places, [value for pair in pairs for value in pair])
    return Packed(down, ups, bias)


def _scaled(tensors: list[Tensor], adapters: Sequence[LoraAdapter]) -> list[Tensor]:
    """Each times its adapter's scaling, by one launch where all are numbers."""
    factors = [adapter.scaling for adapter in adapters]
    if not tensors or any(isinstance(factor, Tensor) for factor in factors):
        return [tensor * factor for tensor, factor in zip(tensors, factors, strict=True)]
    return list(torch._foreach_mul(tensors, factors))  # type: ignore[arg-type]


def down_projection(x: Tensor, group: Group, packed: Packed) -> Tensor:
    """S, (tokens, columns of S), of x (tokens, in_features)."""
    assert packed.a is not None
    rows = row_groups(group, x.shape[0])
    if not group.drops:
        return rows.product(rows.take(x), packed.a.mT)
    s = x.new_empty((x.shape[0], packed.a.shape[1]))
    for i, (first, last) in enumerate(_columns(group)):
        if first < last:
            rows.product(rows.take(dropped(x, i, group)), packed.a[:, first:last].mT, out=s[:, first:last])
    return s


def add_update(base: Tensor, s: Tensor, up: Tensor, group: Group) -> Tensor:
    """base (tokens, out_features) + S (scaling B)^T, written to base."""
    rows = row_groups(group, s.shape[0])
    return base.add_(rows.product(rows.take(s), up.mT))


def fill_update(y: Tensor, s: Tensor, up: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """y[:] = S (scaling B)^T + bias."""
    rows = row_groups(group, s.shape[0])
    return rows.product(rows.take(s), up.mT, y, bias)


def input_gradient(ds: Tensor, a: Tensor, group: Group) -> Tensor:
    """dropout(dS A), (tokens, in_features)."""
    rows = row_groups(group, ds.shape[0])
    if not group.drops:
        return rows.product(rows.take(ds), a)
    parts = [
        dropped(rows.product(rows.take(ds[:, first:last]), a[:, first:last]), i, group)
        for i, (first, last) in enumerate(_columns(group))
        if first < last
    ]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def up_gradients(
    dy: Tensor,
    s: Tensor | None,
    i: int,
    group: Group,
    needs: Sequence[bool],
    grads: list[Tensor | None],
    *,
    up: Tensor,
    ds: Tensor,
) -> None:
    """ds[:] = dy up of projection i, and dB = scaling * dy^T S of each of its adapters, into grads."""
    rows, adapters = row_groups(group, dy.shape[0]), group.projections[i].adapters
    own = rows.take(dy)
    rows.product(own, up, ds)
    wanted = [j for j in range(len(adapters)) if needs[3 * j + 2]]
    if s is None or not wanted:
        return
    db = rows.outer(own, rows.take(s), adapters[wanted[0]].b.dtype)
    found = {j: slot for j in wanted if (slot := rows.slot(adapters[j])) is not None}
    parts = _scaled([db[slot, :, : adapters[j].rank] for j, slot in found.items()], [adapters[j] for j in found])
    given = dict(zip(found, parts, strict=True))
    for j in wanted:
        b = adapters[j].b
        grads[3 * j + 2] = given[j].to(b.dtype) if j in given else torch.zeros_like(b)


def down_gradients(
    ds: Tensor, x: Tensor, group: Group, needs: Sequence[Sequence[bool]], grads: list[list[Tensor | None]]
) -> None:
    """dA = dS^T dropout(x) of each adapter, into grads: one product for the whole group without dropout."""
    rows = row_groups(group, x.shape[0])
    dtype = next(adapter.a.dtype for projection in group.projections for adapter in projection.adapters)
    own = rows.take(ds)
    joint = None if group.drops else rows.outer(own, rows.take(x), dtype)
    for i, (first, last) in enumerate(_columns(group)):
        if not trains_a(needs[i]):
            continue
        if joint is None:
            da = rows.outer(own[..., first:last], rows.take(dropped(x, i, group)), dtype)
        else:
            da = joint[:, first:last]
        for j, adapter in enumerate(group.projections[i].adapters):
            if needs[i][3 * j + 1]:
                slot = rows.slot(adapter)
                part = torch.zeros_like(adapter.a) if slot is None else da[slot, : adapter.rank]
                grads[i][3 * j + 1] = part.to(adapter.a.dtype)


def dropped(t: Tensor, i: int, group: Group) -> Tensor:
    """t (tokens, features) as the adapters of projection i read it, each row with its own one's dropout."""
    seed, index = group.seeds[i], group.adapter_index
    assert index is not None
    if seed is None:
        return t
    by_owner = {adapter.index: adapter.dropout for adapter in group.projections[i].adapters}
    chances = {p for owner in _counts(index) if (p := by_owner.get(owner)) is not None}
    if len(chances) == 1:
        p = chances.pop()
        return dropout(t, seed, p) if p else t
    rows = (len(index), t.shape[0] // max(len(index), 1), t.shape[1])
    result = t.clone()
    for p in chances - {0.0}:
        own = _rows_of(index, tuple(owner for owner, other in by_owner.items() if other == p), t.device)
        result.view(rows).index_copy_(0, own, dropout(t, seed, p).view(rows).index_select(0, own))
    return result


@lru_cache(maxsize=256)
def _rows_of(index: tuple[int, ...], owners: tuple[int, ...], device: torch.device) -> Tensor:
    return _on(device, [i for i, owner in enumerate(index) if owner in owners])


@lru_cache(maxsize=64)
def rows_by_owner(index: tuple[int, ...], device: torch.device) -> tuple[tuple[int, ...], tuple[Tensor, ...], Tensor]:
    """(owners, rows, places) of `Group.adapter_index`: the distinct numbers, each one's rows, and where each row stands
    when these lie one after the other; int64."""
    owners = tuple(_counts(index))
    rows = [[i for i, other in enumerate(index) if other == owner] for owner in owners]
    order = [i for own in rows for i in own]
    places = sorted(range(len(order)), key=order.__getitem__)
    return owners, tuple(_on(device, own) for own in rows), _on(device, places)


def _columns(group: Group) -> list[tuple[int, int]]:
    """(first, last) of each projection's columns of S."""
    widths = group.widths()
    return [(sum(widths[:i]), sum(widths[: i + 1])) for i in range(len(widths))]


def check_adapter_index(
    adapter_index: Sequence[int], x: Tensor, projections: Sequence[LoraProjection]
) -> tuple[int, ...]:
    """As a tuple; TypeError or ValueError, naming the argument, unless it fits x (rows, ..., in_features)."""
    check_instance("adapter_index", adapter_index, tuple, list)
    if any(not isinstance(number, int) for number in adapter_index):
        raise TypeError(f"adapter_index: expected integers, got {adapter_index!r}")
    if x.dim() < 2 or len(adapter_index) != x.shape[0]:
        raise ValueError(
            f"adapter_index: expected a number for each row of x (rows, ..., in_features), got {len(adapter_index)} "
            f"for x of shape {tuple(x.shape)}"
        )
    adapters = [adapter for projection in projections for adapter in projection.adapters]
    if any(adapter.bias is not None for adapter in adapters):
        raise ValueError("adapter_index: expected adapters without bias in a mixed batch, got one with")
    if any(projection.magnitude is not None for projection in projections):
        raise ValueError("adapter_index: expected projections without magnitude in a mixed batch, got one with")
    for projection in projections:
        if len({adapter.index for adapter in projection.adapters}) != len(projection.adapters):
            raise ValueError(
                "adapter_index: expected adapters of differing index in each projection, "
                f"got {[adapter.index for adapter in projection.adapters]}"
            )
    return tuple(adapter_index)
