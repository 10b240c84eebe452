"""The large products of a group: of the frozen weights, with the adapters' updates in them.

Our kernels have the update in the large product's accumulator. The library writes it first, where the dtypes agree, and
the frozen product accumulates onto it: that one reads what it adds to while it multiplies, which costs less than a
narrow product that reads and writes a whole output. Measured on an EPYC with AVX2, fp32, r = 16, 1024 tokens, least of
25, over the frozen product alone: 768 to 768 features 1.00 in place of 1.04, 768 to 2048 1.04 for 1.11, backward 1.00
for 1.02 to 1.04. In backward all of dx accumulates in one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.shapes import kind_of
from . import mixed
from .linear import large_product, library_linear, sums_products
from .parts import adapter_input_gradient, decoded, rows_contiguous
from .projection import Group, LoraProjection, Packed
from .rank_products import triton_takes

LARGEST_DECODED = 256 << 20
"""Bytes of several weights that are decoded at the same time, so that one product takes them all."""


def project(
    y: Tensor,
    inputs: Tensor,
    projection: LoraProjection,
    update: tuple[Tensor, Tensor] | None,
    lora_bias: Tensor | None,
    group: Group,
    shared: dict[str, Any] | None = None,
) -> Tensor | None:
    """y[:] = inputs W^T + bias + S (scaling B)^T + lora_bias, the sum in the widest of the dtypes.

    Args:
        shared: of `FrozenWeight.linear`, for projections of the same inputs.

    Returns:
        W as it was decoded, valid as `decoded`'s; None where the storage made the product.
    """
    dtypes, ours, alike = group.dtypes, group.backend == "triton", group.adapter_index is None
    own, w = projection.weight.linear(inputs, shared), None
    bias = None if projection.bias is None else projection.bias.detach().to(dtypes.compute)
    one_dtype = update is None or dtypes.compute == dtypes.lora == torch.promote_types(dtypes.lora, dtypes.out)
    if own is None and (one_dtype or (ours and alike)):
        bias = lora_bias if bias is None else bias if lora_bias is None else bias + lora_bias
        base = y if ours or y.dtype == dtypes.compute else y.new_empty(y.shape, dtype=dtypes.compute)
        s, up = update or (None, None)
        w = decoded(projection.weight, dtypes.compute)
        if s is None or up is None or alike:
            large_product(inputs, w, s, up, bias, out=base, backend=group.large_backend)
        else:
            mixed.fill_update(base, s, up, bias, group)
            large_product(inputs, w, None, None, out=base, accumulate=True, backend=group.large_backend)
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
            if alike:
                _add_update(base, *update, lora_bias, ours)
            else:
                mixed.add_update(base, *update, group)
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
    """dx: the sum of all dY W and of dropout(dS A), in the widest of the dtypes.

    Without dropout dS A goes with the first of the large products. With it our kernels add it to what these made; the
    library makes it first, for them to add to.

    Args:
        dys, dx_dtype: as for `library.backward_without_input`, rows contiguous.
        ds: (tokens, total rank), or None.
    """
    dtypes, a, ours = group.dtypes, packed.a, group.backend == "triton"
    wide = torch.promote_types(dtypes.compute, dx_dtype)
    one_dtype = dtypes.compute == dtypes.lora == wide
    dx: Tensor | None = None
    update: tuple[Tensor, Tensor] | None = None
    alike = group.adapter_index is None
    if ds is not None and a is not None and (one_dtype or (ours and alike)):
        if alike and not group.drops:
            update, ds = (ds, a.t()), None
        elif not alike or not triton_takes((ds.shape[0], a.shape[1]), ds, next(group.masks()), group.backend):
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
                dx, update = _add_products(pairs, dx, update, wide, group.large_backend), None
                pairs.clear()
        else:
            part = torch.mm(dy, decoded(weight, dtypes.compute)) if part is None else part
            dx = rows_contiguous(part.to(wide)) if dx is None else dx.add_(part)
    if pairs:
        dx, update = _add_products(pairs, dx, update, wide, group.large_backend), None
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
    if kind_of(decodes[0].device) != "cuda" or size > LARGEST_DECODED:
        return False
    shapes = [weight.shape for _, weight in given]
    return sums_products(given[0][0].shape[0], shapes, dtype, decodes[0].device, group.large_backend)
