"""LoRA projections written out forward and backward, in the library's matrix products (BLAS, cuBLAS) and our own.

For n projections of one input: S = x A^T is one product for all adapters and is kept for backward, and dA is one
product for all: 1 + 2n products forward, 3n + 2 backward. A frozen weight is decoded twice, once in forward and once in
backward, into a buffer that is used again.

`rank_products` makes those of rank width, `linear` the large ones with their updates: each by the library or by our
kernels, as the group's backend or a measurement says. Our kernels have the update in the large product's accumulator.
The library writes it first, where the dtypes agree, and the frozen product accumulates onto it: that one reads what it
adds to while it multiplies, which costs less than a narrow product that reads and writes a whole output. Measured on an
EPYC with AVX2, fp32, r = 16, 1024 tokens, least of 25, over the frozen product alone: 768 to 768 features 1.00 in place
of 1.04, 768 to 2048 1.04 for 1.11, backward 1.00 for 1.02 to 1.04. In backward all of dx accumulates in one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.device import triton_serves
from ..common.random import TRITON_DTYPES
from . import dora, parts
from .linear import large_product, library_linear, sums_products
from .mixed import keep_own_
from .parts import (
    adapter_input_gradient,
    bias_gradients,
    decoded,
    down_gradients,
    down_projection,
    empty_ds,
    rows_contiguous,
    up_gradients,
)
from .projection import Group, LoraProjection, Packed
from .rank_products import triton_takes

__all__ = [
    "backward",
    "backward_without_input",
    "down_gradients",
    "down_projection",
    "forward",
    "forward_into",
    "large_input_gradient",
    "pack",
]


LARGEST_DECODED = 256 << 20
"""Bytes of several weights that are decoded at the same time, so that one product takes them all."""


def pack(group: Group) -> Packed:
    """Cast, scale and join the adapters, once for the whole group; on a GPU by one launch for each four of them."""
    dtype = group.dtypes.lora
    if group.backend != "triton":
        if not triton_serves(group.projections[0].weight.device):
            return parts.pack(group.projections, dtype)
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
        S, (tokens, total rank), or None.
    """
    inputs = x.to(group.dtypes.compute)
    s = down_projection(x, group, packed) if s is None else s
    column = 0
    for i, projection in enumerate(group.projections):
        update, up = None, packed.b[i]
        first, column = column, column + projection.rank
        if up is not None and s is not None:
            update = (s[:, first:column], up)
        if projection.magnitude is None:
            _project(outputs[i], inputs, projection, update, packed.bias[i], group)
            held = None
        else:
            assert update is not None and packed.a is not None
            a = packed.a[first:column]
            z, seen = dora.before_gain(outputs[i], inputs, i, group, a, update[0], kept is not None)
            w = _project(z, seen, dora.without_bias(projection), update, None, group)
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
    grads: list[list[Tensor | None]] = [[None] * len(flags) for flags in needs]
    dys = [None if dy is None else rows_contiguous(dy) for dy in dys]
    ds = empty_ds(dys, packed)
    dropped: list[tuple[Tensor, Tensor, Tensor, int]] = []
    column = 0
    for i, projection in enumerate(group.projections):
        first, column = column, column + projection.rank
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
        s_i, ds_i = None if s is None else s[:, first:column], ds[:, first:column]
        up_gradients(dy, s_i, projection, needs[i], grads[i], up=up, ds=ds_i, backend=group.backend)
        db = grads[i][2] if gain is not None else None
        if db is not None and gain is not None:
            grads[i][2] = dora.scale_rows(db, gain)
    if ds is not None:
        keep_own_(ds, group)
    if dx_dtype is None:
        return None, ds, grads
    dx = large_input_gradient(dys, ds, group, packed, dx_dtype)
    for each in dropped:
        dx = dora.add_dropped_gradient(dx, *each, group)
    return dx, ds, grads


def _project(
    y: Tensor,
    inputs: Tensor,
    projection: LoraProjection,
    update: tuple[Tensor, Tensor] | None,
    lora_bias: Tensor | None,
    group: Group,
) -> Tensor | None:
    """y[:] = inputs W^T + bias + S (scaling B)^T + lora_bias, the sum in the widest of the dtypes.

    Returns:
        W as it was decoded, valid as `decoded`'s; None where the storage made the product.
    """
    dtypes, ours = group.dtypes, group.backend == "triton"
    own, w = projection.weight.linear(inputs), None
    bias = None if projection.bias is None else projection.bias.detach().to(dtypes.compute)
    one_dtype = update is None or dtypes.compute == dtypes.lora == torch.promote_types(dtypes.lora, dtypes.out)
    if own is None and (ours or one_dtype):
        bias = lora_bias if bias is None else bias if lora_bias is None else bias + lora_bias
        base = y if ours or y.dtype == dtypes.compute else y.new_empty(y.shape, dtype=dtypes.compute)
        s, up = update or (None, None)
        w = decoded(projection.weight, dtypes.compute)
        large_product(inputs, w, s, up, bias, out=base, backend=group.backend)
    else:
        base = y if y.dtype == dtypes.compute else y.new_empty(y.shape, dtype=dtypes.compute)
        if own is not None:
            base.copy_(own) if bias is None else torch.add(own, bias, out=base)
        else:
            w = decoded(projection.weight, dtypes.compute)
            library_linear(inputs, w, None, None, bias, out=base)
        if update is not None:
            wide = torch.promote_types(dtypes.compute, dtypes.lora)
            if base is not y:
                base = y.copy_(base) if torch.promote_types(wide, dtypes.out) == dtypes.out else base.to(wide)
            _add_update(base, *update, lora_bias, ours)
    if base is not y:
        y.copy_(base)
    return w


def _add_update(base: Tensor, s: Tensor, up: Tensor, lora_bias: Tensor | None, ours: bool) -> None:
    """base += S (scaling B)^T + lora_bias, where the frozen product stands for itself."""
    if ours or s.dtype == base.dtype:
        backend = "triton" if ours else "library"
        large_product(s, up, None, None, lora_bias, out=base, accumulate=True, backend=backend)
    else:
        base.add_(torch.mm(s, up.t()) if lora_bias is None else torch.addmm(lora_bias, s, up.t()))


def large_input_gradient(
    dys: Sequence[Tensor | None], ds: Tensor | None, group: Group, packed: Packed, dx_dtype: torch.dtype
) -> Tensor | None:
    """dx: the sum of all dY W and of dropout(dS A), in the widest of the dtypes; arguments as above.

    Without dropout dS A goes with the first of the large products. With it our kernels add it to what these made; the
    library makes it first, for them to add to.
    """
    dtypes, a, ours = group.dtypes, packed.a, group.backend == "triton"
    wide = torch.promote_types(dtypes.compute, dx_dtype)
    one_dtype = dtypes.compute == dtypes.lora == wide
    dx: Tensor | None = None
    update: tuple[Tensor, Tensor] | None = None
    if ds is not None and a is not None and (ours or one_dtype):
        if not group.drops:
            update, ds = (ds, a.t()), None
        elif not triton_takes((ds.shape[0], a.shape[1]), ds, next(group.masks()), group.backend):
            dx, ds = adapter_input_gradient(ds, a, group), None
    pairs: list[tuple[Tensor, Tensor]] = []
    together = _decodes_together(group, dys)
    for dy, projection in zip(dys, group.projections, strict=True):
        if dy is None:
            continue
        dy, weight = dy.to(dtypes.compute), projection.weight
        part = weight.linear_t(dy)
        if part is None and (ours or wide == dtypes.compute):
            pairs.append((dy, decoded(weight, dtypes.compute).t()))
            if not together:
                dx, update = _add_products(pairs, dx, update, wide, group.backend), None
                pairs.clear()
        else:
            part = torch.mm(dy, decoded(weight, dtypes.compute)) if part is None else part
            dx = rows_contiguous(part.to(wide)) if dx is None else dx.add_(part)
    if pairs:
        dx, update = _add_products(pairs, dx, update, wide, group.backend), None
    if update is not None:  # every product was the storage's own
        ds = update[0]
    return dx if ds is None or a is None else adapter_input_gradient(ds, a, group, dx)


def _add_products(
    pairs: Sequence[tuple[Tensor, Tensor]],
    dx: Tensor | None,
    update: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """dx, or a new matrix of `dtype`, with the sum of dY W and the update added to it."""
    (dy, w), (s, b) = pairs[0], update or (None, None)
    out = dy.new_empty((dy.shape[0], w.shape[0]), dtype=dtype) if dx is None else dx
    return large_product(dy, w, s, b, more=pairs[1:], out=out, accumulate=dx is not None, backend=backend)


def _decodes_together(group: Group, dys: Sequence[Tensor | None]) -> bool:
    """Whether the weights of several projections may lie decoded at once: as they are stored, or for one product.

    On a CPU each is decoded into the same warm buffer.
    """
    given = [(dy, q.weight) for dy, q in zip(dys, group.projections, strict=True) if dy is not None]
    dtype = group.dtypes.compute
    decodes = [weight for _, weight in given if not weight.is_ready(dtype)]
    if not decodes:
        return True
    size = sum(weight.shape[0] * weight.shape[1] for weight in decodes) * dtype.itemsize
    if decodes[0].device.type != "cuda" or size > LARGEST_DECODED:
        return False
    shapes = [weight.shape for _, weight in given]
    return sums_products(given[0][0].shape[0], shapes, dtype, decodes[0].device, group.backend)
