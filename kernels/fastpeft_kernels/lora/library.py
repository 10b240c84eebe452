"""LoRA projections on the library's matrix products (BLAS, cuBLAS), written out forward and backward.

For n projections of one input: S = x A^T is one product for all adapters and is kept for backward, and dA is one
product for all: 1 + 2n products forward, 3n + 2 backward. A frozen weight is decoded twice, once in forward and once in
backward, into a buffer that is used again.

Where the dtypes agree, the adapters' part is written first and the frozen product accumulates onto it: that one reads
what it adds to while it multiplies, which costs less than a narrow product that reads and writes a whole output.
Measured on an EPYC with AVX2, fp32, r = 16, 1024 tokens, least of 25, over the frozen product alone: 768 to 768
features 1.00 in place of 1.04, 768 to 2048 1.04 for 1.11, backward 1.00 for 1.02 to 1.04. In backward all of dx
accumulates in one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.device import device_capability, triton_serves
from ..common.random import TRITON_DTYPES
from ..weights import FrozenWeight
from . import parts
from .parts import (
    adapter_input_gradient,
    bias_gradients,
    decoded,
    down_gradients,
    down_projection,
    empty_ds,
    multiplies_dense,
    rows_contiguous,
    up_gradients,
)
from .projection import Dtypes, Group, LoraProjection, Packed

__all__ = [
    "backward",
    "backward_without_input",
    "down_gradients",
    "down_projection",
    "forward",
    "forward_into",
    "pack",
]


def pack(projections: Sequence[LoraProjection], dtype: torch.dtype) -> Packed:
    """Cast, scale and join the adapters, once for the whole group; on a GPU by one launch for each four of them."""
    found = [adapter.a for projection in projections for adapter in projection.adapters]
    if not found or not found[0].is_cuda or not {dtype, *(a.dtype for a in found)}.issubset(TRITON_DTYPES):
        return parts.pack(projections, dtype)
    if not triton_serves(found[0].device):
        return parts.pack(projections, dtype)
    from . import packing

    return packing.pack(projections, dtype)


def forward(x: Tensor, group: Group, packed: Packed) -> tuple[list[Tensor], Tensor | None]:
    """All outputs and S.

    Args:
        x: (..., in_features), any floating dtype.
        group, packed: the projections, and their adapters from `pack`.

    Returns:
        (outputs, s): outputs[i] is (..., out_features) and no view; s is (tokens, total rank) or None.
    """
    outputs = [x.new_empty((*x.shape[:-1], p.weight.shape[0]), dtype=group.dtypes.out) for p in group.projections]
    rows = [y.view(-1, y.shape[-1]) for y in outputs]
    return outputs, forward_into(rows, x.reshape(-1, x.shape[-1]), group, packed)


def forward_into(
    outputs: Sequence[Tensor],
    x: Tensor,
    group: Group,
    packed: Packed,
    s: Tensor | None = None,
) -> Tensor | None:
    """`forward` into given memory.

    Args:
        outputs: matrices (tokens, out_features) of dtype `group.dtypes.out`, columns contiguous.
        x: (tokens, in_features).
        group, packed: as `forward`.
        s: S, if `down_projection` has made it already.

    Returns:
        S, (tokens, total rank), or None.
    """
    inputs = x.to(group.dtypes.compute)
    s = down_projection(x, group, packed) if s is None else s
    column = 0
    for i, projection in enumerate(group.projections):
        update, up = None, packed.b[i]
        if up is not None and s is not None:
            update = (s[:, column : column + projection.rank], up)
            column += projection.rank
        _project(outputs[i], inputs, projection, update, packed.bias[i], group.dtypes)
    return s


def backward(
    x: Tensor | None,
    s: Tensor | None,
    dys: Sequence[Tensor | None],
    group: Group,
    packed: Packed,
    dx_dtype: torch.dtype | None,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradients of x and of `LoraProjection.tensors()` of each projection.

    Args:
        x: (tokens, in_features) as kept by forward; None when no adapter's `a` is trained.
        s, dys, group, packed, dx_dtype, needs: as `backward_without_input`.

    Returns:
        (dx, grads): dx (tokens, in_features) in any of the dtypes given, rows maybe apart; grads in the parameters'
        dtypes; None where not wanted.
    """
    dx, ds, grads = backward_without_input(s, dys, group, packed, dx_dtype, needs)
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
) -> tuple[Tensor | None, Tensor | None, list[list[Tensor | None]]]:
    """All of `backward` that does not read x.

    Args:
        s: (tokens, total rank) as kept by forward; None when no adapter's `b` is trained.
        dys: gradient of each output, (tokens, out_features) of dtype `group.dtypes.out`, or None where it is zero.
        dx_dtype: dtype of x, whose gradient is summed in it where it is wider than `group.dtypes.compute`; None when no
            gradient of x is wanted.
        needs: which other gradients are wanted; needs[i] runs parallel to `tensors()` of projection i.

    Returns:
        (dx, ds, grads): as `backward`, and dS, (tokens, total rank), for `down_gradients`.
    """
    grads: list[list[Tensor | None]] = [[None] * len(flags) for flags in needs]
    dys = [None if dy is None else rows_contiguous(dy) for dy in dys]
    ds = empty_ds(dys, packed)
    column = 0
    for i, projection in enumerate(group.projections):
        first, column = column, column + projection.rank
        dy = dys[i]
        if dy is None:
            continue
        bias_gradients(dy, projection, needs[i], grads[i])
        up = packed.b[i]
        if ds is None or up is None:
            continue
        dy = dy.to(group.dtypes.lora)
        of_it = slice(first, column)
        up_gradients(dy, None if s is None else s[:, of_it], projection, needs[i], grads[i], up=up, ds=ds[:, of_it])
    return None if dx_dtype is None else _input_gradient(dys, ds, group, packed, dx_dtype), ds, grads


def _project(
    y: Tensor,
    inputs: Tensor,
    projection: LoraProjection,
    update: tuple[Tensor, Tensor] | None,
    lora_bias: Tensor | None,
    dtypes: Dtypes,
) -> None:
    """y[:] = inputs W^T + bias + S (scaling B)^T + lora_bias, the sum in the widest of the dtypes."""
    own = projection.weight.linear(inputs)
    bias = None if projection.bias is None else projection.bias.detach().to(dtypes.compute)
    if own is None and update is not None and dtypes.compute == dtypes.lora == dtypes.out:
        s, up = update[0], update[1].t()
        bias = lora_bias if bias is None else bias if lora_bias is None else bias + lora_bias
        if _may_fuse(inputs):
            from .linear import chosen_linear

            chosen_linear(inputs, decoded(projection.weight, dtypes.compute), *update, bias, out=y, default="torch")
            return
        torch.mm(s, up, out=y) if bias is None else torch.addmm(bias, s, up, out=y)
        torch.addmm(y, inputs, decoded(projection.weight, dtypes.compute).t(), out=y)
        return
    base = y if dtypes.compute == dtypes.out else y.new_empty(y.shape, dtype=dtypes.compute)
    if own is not None:
        base.copy_(own) if bias is None else torch.add(own, bias, out=base)
    else:
        weight = decoded(projection.weight, dtypes.compute).t()
        torch.mm(inputs, weight, out=base) if bias is None else torch.addmm(bias, inputs, weight, out=base)
    if update is not None:
        wide = torch.promote_types(dtypes.compute, dtypes.lora)
        if base is not y:
            base = y.copy_(base) if torch.promote_types(wide, dtypes.out) == dtypes.out else base.to(wide)
        s, up = update
        if s.dtype != base.dtype:
            base.add_(torch.mm(s, up.t()) if lora_bias is None else torch.addmm(lora_bias, s, up.t()))
        elif lora_bias is None:
            torch.addmm(base, s, up.t(), out=base)
        else:
            torch.addmm(base, s, up.t(), out=base).add_(lora_bias)
    if base is not y:
        y.copy_(base)


def _input_gradient(
    dys: Sequence[Tensor | None], ds: Tensor | None, group: Group, packed: Packed, dx_dtype: torch.dtype
) -> Tensor | None:
    """The sum of all dY W and of dropout(dS A)."""
    dtypes, a = group.dtypes, packed.a
    dx: Tensor | None = None
    if ds is not None and a is not None and dtypes.compute == dtypes.lora == torch.promote_types(dtypes.lora, dx_dtype):
        if _may_fuse(ds) and not group.drops and dtypes.out == dtypes.compute and multiplies_dense(group):
            return _fused_input_gradient(dys, ds, group, a)
        dx, ds = adapter_input_gradient(ds, a, group), None
    for dy, projection in zip(dys, group.projections, strict=True):
        if dy is not None:
            dx = _accumulate_input_gradient(dx, dy.to(dtypes.compute), projection.weight, dx_dtype)
    return dx if ds is None or a is None else adapter_input_gradient(ds, a, group, dx)


def _fused_input_gradient(dys: Sequence[Tensor | None], ds: Tensor, group: Group, a: Tensor) -> Tensor:
    """The same in one dtype, without dropout: dS A goes into the first of the large products."""
    from .linear import chosen_linear

    dx = ds.new_empty((ds.shape[0], a.shape[1]))
    update: tuple[Tensor, Tensor] | tuple[None, None] = (ds, a.t())
    for dy, projection in zip(dys, group.projections, strict=True):
        if dy is not None:
            w = decoded(projection.weight, ds.dtype).t()
            chosen_linear(dy, w, *update, out=dx, accumulate=update[0] is None, default="torch")
            update = (None, None)
    return dx


def _may_fuse(x: Tensor) -> bool:
    """Whether our kernels could compute an update within the large product, where a measurement says so."""
    return x.is_cuda and x.dtype.itemsize == 2 and (device_capability(x.device) or 0) >= 80 and triton_serves(x.device)


def _accumulate_input_gradient(dx: Tensor | None, dy: Tensor, weight: FrozenWeight, dx_dtype: torch.dtype) -> Tensor:
    """dx + dy W, one product; summed apart where x is wider than the products, as autograd would."""
    own = weight.linear_t(dy)
    if own is None:
        values = decoded(weight, dy.dtype)
        if dx is not None and dx.dtype == dy.dtype:
            return torch.addmm(dx, dy, values, out=dx)
        own = torch.mm(dy, values)
    return own.to(torch.promote_types(own.dtype, dx_dtype)) if dx is None else dx.add_(own)
