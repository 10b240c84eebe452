"""Mixed batches: each row of a batch has an adapter of its own, and reads no other.

In S = x (scaling A)^T, dS = dY B and the products a projection has as many columns as its largest adapter; adapters of
lower rank are filled up with zeros, and rows without an adapter meet zeros alone. `mixed_packing` joins the adapters,
`mixed_products` multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from ..common.random import dropout
from ..common.validation import check_instance
from . import mixed_native
from .mixed_packing import scaled
from .mixed_products import MixedProducts
from .mixed_rows import owners_of, rows_with, slots_of
from .projection import Group, LoraProjection, Mask, Packed, trains_a, trains_b


def down_projection(x: Tensor, group: Group, packed: Packed) -> Tensor:
    """S, (tokens, columns of S), of x (tokens, in_features)."""
    assert packed.a is not None
    products = MixedProducts(group, x.shape[0])
    if not group.drops:
        return products.project_down(x, packed.a)
    s = x.new_empty((x.shape[0], packed.a.shape[1]))
    for i, first, last in _columns(group):
        values, mask = _masked(x, i, group)
        products.project_down(values, packed.a[:, first:last], s[:, first:last], mask)
    return s


def add_update(base: Tensor, s: Tensor, up: Tensor, group: Group) -> Tensor:
    """base (tokens, out_features) + S B^T, written to base."""
    return MixedProducts(group, s.shape[0]).update(s, up.mT, base, accumulate=True)


def fill_update(y: Tensor, s: Tensor, up: Tensor, bias: Tensor | None, group: Group) -> Tensor:
    """y[:] = S B^T + bias."""
    return MixedProducts(group, s.shape[0]).update(s, up.mT, y, bias)


def input_gradient(ds: Tensor, a: Tensor, group: Group, dx: Tensor | None) -> Tensor:
    """dropout(dS A), (tokens, in_features), or added to dx, which may be written over, in the wider of their dtypes."""
    products, ranges = MixedProducts(group, ds.shape[0]), list(_columns(group))
    for i, first, last in ranges if group.drops else [(0, 0, ds.shape[1])]:
        accumulate = dx is not None
        dtype = ds.dtype if dx is None else torch.promote_types(dx.dtype, ds.dtype)
        dx = ds.new_empty((ds.shape[0], a.shape[2])) if dx is None else dx.to(dtype)
        own, columns = a[:, first:last], ds[:, first:last]
        chances = _chances(i, group) if group.drops else set()
        if len(chances) < 2:
            products.update(columns, own, dx, None, _mask(i, group, chances), accumulate)
            continue
        part = dropped(products.update(columns, own, torch.empty_like(dx, dtype=ds.dtype)), i, group)
        dx = dx.add_(part) if accumulate else part
    assert dx is not None
    return dx


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
    """ds[:] = dy up of projection i, and dB = dy^T S of each of its adapters, into grads."""
    adapters, products = group.projections[i].adapters, MixedProducts(group, dy.shape[0])
    if s is None or not trains_b(needs):
        products.project_down(dy, up.mT, ds)
        return
    dtype = _widest([adapter.b.dtype for adapter in adapters])
    db = products.both_gradients(dy, up, s, ds, dtype).to(dtype)
    _hand_out(db, 2, i, group, needs, grads)


def down_gradients(
    ds: Tensor, x: Tensor, group: Group, needs: Sequence[Sequence[bool]], grads: list[list[Tensor | None]]
) -> None:
    """dA = scaling * dS^T dropout(x) of each adapter, into grads: one product for the whole group without dropout."""
    products = MixedProducts(group, x.shape[0])
    dtype = _widest([adapter.a.dtype for projection in group.projections for adapter in projection.adapters])
    joint = None if group.drops else scaled(products.down_gradient(ds, x, dtype), group, dtype)
    for i, first, last in _columns(group):
        if not trains_a(needs[i]):
            continue
        if joint is None:
            values, mask = _masked(x, i, group)
            da = scaled(products.down_gradient(ds[:, first:last], values, dtype, mask), group, dtype, first)
        else:
            da = joint[:, first:last]
        _hand_out(da, 1, i, group, needs[i], grads[i])


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, set(dtypes))


def _hand_out(
    stack: Tensor, place: int, i: int, group: Group, needs: Sequence[bool], grads: list[Tensor | None]
) -> None:
    """Of what a product gave for each slot, each adapter's gradient of a (place 1) or b (place 2), if it is wanted."""
    adapters, wanted = group.projections[i].adapters, needs[place:-1:3]
    parameters = [adapter.a if place == 1 else adapter.b for adapter in adapters]
    if (native := mixed_native.owned(group)) is not None:
        grads[place:-1:3] = native.apart(stack, place - 1, i, parameters, wanted)
        return
    slots, parts = slots_of(group.adapter_index or ()), stack.unbind()
    for j, (adapter, parameter) in enumerate(zip(adapters, parameters, strict=True)):
        if not wanted[j]:
            continue
        slot = slots.get(adapter.index)
        if slot is None:
            grads[3 * j + place] = torch.zeros_like(parameter)
            continue
        part = parts[slot]
        if part.shape != parameter.shape:
            part = part.narrow(place - 1, 0, adapter.rank)
        grads[3 * j + place] = part.to(parameter.dtype)


def _chances(i: int, group: Group) -> set[float]:
    """With which elements are dropped for the adapters of projection i that rows have."""
    if group.seeds[i] is None:
        return set()
    owners = owners_of(group.adapter_index or ())
    return {adapter.dropout for adapter in group.projections[i].adapters if adapter.index in owners}


def _mask(i: int, group: Group, chances: set[float]) -> Mask | None:
    """One for all rows, of the one chance or none that there is."""
    seed, p = group.seeds[i], max(chances, default=0.0)
    return None if seed is None or not p else Mask(seed, p, 0)


def _masked(x: Tensor, i: int, group: Group) -> tuple[Tensor, Mask | None]:
    """What the adapters of projection i read of x (tokens, features), and the mask that is still to be made of it."""
    chances = _chances(i, group)
    return (x, _mask(i, group, chances)) if len(chances) < 2 else (dropped(x, i, group), None)


def dropped(t: Tensor, i: int, group: Group) -> Tensor:
    """t (tokens, features) as the adapters of projection i read it, each row with its own one's dropout."""
    seed, index = group.seeds[i], group.adapter_index
    assert seed is not None and index is not None
    by_owner = {adapter.index: adapter.dropout for adapter in group.projections[i].adapters}
    rows = (len(index), t.shape[0] // max(len(index), 1), t.shape[1])
    result = t.clone()
    for p in _chances(i, group) - {0.0}:
        own = rows_with(index, tuple(owner for owner, other in by_owner.items() if other == p), t.device)
        result.view(rows).index_copy_(0, own, dropout(t, seed, p).view(rows).index_select(0, own))
    return result


def _columns(group: Group) -> Iterator[tuple[int, int, int]]:
    """(i, first, last) of the columns of S of each projection that has any."""
    last = 0
    for i, width in enumerate(group.widths()):
        first, last = last, last + width
        if width:
            yield i, first, last


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
