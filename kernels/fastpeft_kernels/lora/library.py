"""LoRA projections written out forward and backward, in the library's matrix products (BLAS, cuBLAS) and our own.

For n projections of one input: S = x A^T is one product for all adapters and is kept for backward, and dA is one
product for all: 1 + 2n products forward, 3n + 2 backward. A frozen weight is decoded twice, once in forward and once in
backward, into a buffer that is used again.

`rank_products` makes those of rank width, `frozen_products` the large ones with their updates: each by the library or
by our kernels, as the group's backend or a measurement says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.device import triton_serves
from ..common.random import TRITON_DTYPES
from . import direct, dora, mixed, mixed_packing, parts
from .frozen_products import large_input_gradient, project
from .parts import (
    bias_gradients,
    down_projection,
    empty_ds,
    rows_contiguous,
    up_gradients,
)
from .projection import Group, Packed

__all__ = [
    "backward",
    "backward_without_input",
    "down_gradients",
    "down_projection",
    "forward",
    "forward_into",
    "pack",
]


def pack(group: Group, tokens: int | None = None) -> Packed:
    """Cast, scale and join the adapters, once for the whole group; on a GPU by one launch for each four of them.

    On a CPU, a lone one, and for products that are C++'s, by C++ where it can, one pass over each matrix: that takes
    the host less than the launch with its many arguments.

    Args:
        tokens: that are multiplied, if known.
    """
    dtype = group.dtypes.lora
    if group.adapter_index is not None:
        return mixed_packing.pack(group)
    if group.one_a:
        return parts.pack(group.projections, dtype, one_a=True)
    if group.backend != "triton":
        lone = sum([len(p.adapters) for p in group.projections]) == 1
        few = lone or (tokens is not None and direct.packs(tokens, group))
        if few or not triton_serves(group.projections[0].weight.device):
            return direct.pack(group) or parts.pack(group.projections, dtype)
        if not {dtype, *(a.a.dtype for p in group.projections for a in p.adapters)}.issubset(TRITON_DTYPES):
            return parts.pack(group.projections, dtype)
    from . import packing

    return packing.pack(group.projections, dtype)


def forward(
    x: Tensor, group: Group, packed: Packed, kept: list[dora.Kept | None] | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """All outputs and S.

    Args:
        x: (..., in_features), any floating dtype.
        group, packed: the projections, and their adapters from `pack`.
        kept: a list to add to what backward reads of each projection, None for one without magnitude; nothing is kept
            where there is no list.

    Returns:
        (outputs, s): outputs[i] is (..., out_features) and no view; s is (tokens, total rank) or None.
    """
    outputs = [x.new_empty((*x.shape[:-1], p.weight.shape[0]), dtype=group.dtypes.out) for p in group.projections]
    rows = [y.view(-1, y.shape[-1]) for y in outputs]
    return outputs, forward_into(rows, x.reshape(-1, x.shape[-1]), group, packed, kept=kept)


def forward_into(
    outputs: Sequence[Tensor],
    x: Tensor,
    group: Group,
    packed: Packed,
    s: Tensor | None = None,
    kept: list[dora.Kept | None] | None = None,
) -> Tensor | None:
    """`forward` into given memory.

    Args:
        outputs: matrices (tokens, out_features) of dtype `group.dtypes.out`, columns contiguous.
        x: (tokens, in_features).
        group, packed, kept: as `forward`.
        s: S, if `down_projection` has made it already.

    Returns:
        S, (tokens, total rank), or None; with `group.one_a` (tokens, rank), in a mixed batch (tokens, sum of
        `group.widths()`), here and elsewhere.
    """
    if (done := direct.project(outputs, x, group, packed, s)) is not None:
        if kept is not None:
            kept += [None] * len(outputs)
        return done[0]
    inputs = x.to(group.dtypes.compute)
    s = down_projection(x, group, packed) if s is None else s
    column, shared = 0, dict[str, Any]()
    for i, (projection, width) in enumerate(zip(group.projections, group.widths(), strict=True)):
        update, up = None, packed.b[i]
        first = 0 if group.one_a else column
        column = first + width
        if up is not None and s is not None:
            update = (s[:, first:column], up)
        if projection.magnitude is None:
            project(outputs[i], inputs, projection, update, packed.bias[i], group, shared)
            held = None
        else:
            assert update is not None and packed.a is not None
            a = packed.a[first:column]
            z, seen = dora.before_gain(outputs[i], inputs, i, group, a, update[0], kept is not None)
            same = shared if seen is inputs else None
            w = project(z, seen, dora.without_bias(projection), update, None, group, same)
            held = dora.apply_gain(outputs[i], z, inputs, seen, i, group, w, update[1], a)
        if kept is not None:
            kept.append(held)
    return s


def backward(
    x: Tensor | None,
    s: Tensor | None,
    dys: Sequence[Tensor | None],
    group: Group,
    packed: Packed,
    dx_dtype: torch.dtype | None,
    needs: Sequence[Sequence[bool]],
    kept: Sequence[dora.Kept | None] = (),
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradients of x and of `LoraProjection.tensors()` of each projection.

    Args:
        x: (tokens, in_features) as kept by forward; None when no adapter's `a` is trained.
        s, dys, group, packed, dx_dtype, needs, kept: as `backward_without_input`.

    Returns:
        (dx, grads): dx (tokens, in_features) in any of the dtypes given, rows maybe apart; grads in the parameters'
        dtypes; None where not wanted.
    """
    dx, ds, grads = backward_without_input(s, dys, group, packed, dx_dtype, needs, kept)
    if ds is not None and x is not None:
        down_gradients(ds, x.to(group.dtypes.lora), group, needs, grads)
    return dx, grads


def down_gradients(
    ds: Tensor, x: Tensor, group: Group, needs: Sequence[Sequence[bool]], grads: list[list[Tensor | None]]
) -> None:
    """Those of each adapter's a, into `grads`, of dS and x (tokens, in_features) in the dtype of dS."""
    if not direct.down_gradients(ds, x, group, needs, grads):
        parts.down_gradients(ds, x, group, needs, grads)


def backward_without_input(
    s: Tensor | None,
    dys: Sequence[Tensor | None],
    group: Group,
    packed: Packed,
    dx_dtype: torch.dtype | None,
    needs: Sequence[Sequence[bool]],
    kept: Sequence[dora.Kept | None] = (),
) -> tuple[Tensor | None, Tensor | None, list[list[Tensor | None]]]:
    """All of `backward` that does not read x.

    Args:
        s: (tokens, total rank) as kept by forward; None when no adapter's `b` is trained.
        dys: gradient of each output, (tokens, out_features) of dtype `group.dtypes.out`, or None where it is zero.
        dx_dtype: dtype of x, whose gradient is summed in it where it is wider than `group.dtypes.compute`; None when no
            gradient of x is wanted.
        needs: which other gradients are wanted; needs[i] runs parallel to `tensors()` of projection i.
        kept: of forward, where any projection has a magnitude.

    Returns:
        (dx, ds, grads): as `backward`, and dS, (tokens, total rank), for `down_gradients`.
    """
    dys = [None if dy is None else rows_contiguous(dy) for dy in dys]
    if (done := direct.derive(s, dys, group, packed, dx_dtype, needs)) is not None:
        return done
    grads: list[list[Tensor | None]] = [[None] * len(flags) for flags in needs]
    ds = empty_ds(dys, group, packed)
    dropped: list[tuple[Tensor, Tensor, Tensor, int]] = []
    column = 0
    for i, (projection, width) in enumerate(zip(group.projections, group.widths(), strict=True)):
        first, column = column, column + width
        dy = dys[i]
        if dy is None:
            continue
        bias_gradients(dy, projection, needs[i], grads[i])
        up, a, gain = packed.b[i], packed.a, None
        if ds is None or up is None or a is None:
            continue
        held = kept[i] if projection.magnitude is not None else None
        if held is not None:
            gain, dz = dora.magnitude_gradient(dy, held, i, group, dx_dtype is not None, needs[i], grads[i])
            up = dora.scale_rows(up, gain)
            if dz is not None and group.mask(i) is not None:
                dropped.append((dz, ds[:, first:column], a[first:column], i))
            else:
                dys[i] = dz
        dy = dy.to(group.dtypes.lora)
        ds_i = ds[:, first:column]
        s_i = s if s is None or group.one_a else s[:, first:column]
        if group.adapter_index is not None:
            mixed.up_gradients(dy, s_i, i, group, needs[i], grads[i], up=up, ds=ds_i)
            continue
        up_gradients(dy, s_i, projection, needs[i], grads[i], up=up, ds=ds_i, backend=group.backend)
        db = grads[i][2] if gain is not None else None
        if db is not None and gain is not None:
            grads[i][2] = dora.scale_rows(db, gain)
    if ds is not None and group.one_a and packed.a is not None:
        ds = ds.view(ds.shape[0], -1, packed.a.shape[0]).sum(1)
    if dx_dtype is None:
        return None, ds, grads
    dx = large_input_gradient(dys, ds, group, packed, dx_dtype)
    for each in dropped:
        dx = dora.add_dropped_gradient(dx, *each, group)
    return dx, ds, grads
