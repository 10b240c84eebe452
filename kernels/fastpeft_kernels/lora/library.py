"""LoRA projections on the library's matrix products (BLAS, cuBLAS), written out forward and backward.

For n projections of one input with adapters: S = x A^T is one product for all of them and is kept for backward; the
up projection accumulates into the frozen product's output; in backward every term of dx accumulates into one buffer,
and dA is one product for all. The frozen weight is decoded twice, once in forward and once in backward, into a buffer
that is used again. Forward: 1 + 2n products, backward: 3n + 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.random import dropout
from ..weights import FrozenWeight
from .parts import adapter_columns, bias_gradients, decoded, empty_ds
from .projection import Dtypes, LoraProjection, Packed


def pack(projections: Sequence[LoraProjection], dtype: torch.dtype) -> Packed:
    """Cast, scale and join the adapters, once for the whole group."""
    down = [adapter.a.detach() for projection in projections for adapter in projection.adapters]
    a = None if not down else (down[0] if len(down) == 1 else torch.cat(down)).to(dtype)
    b: list[Tensor | None] = []
    bias: list[Tensor | None] = []
    for projection in projections:
        up = [_scaled(adapter.b.detach(), adapter.scaling, dtype) for adapter in projection.adapters]
        b.append(None if not up else up[0] if len(up) == 1 else torch.cat(up, dim=1))
        offsets = [_scaled(a_.bias.detach(), a_.scaling, dtype) for a_ in projection.adapters if a_.bias is not None]
        bias.append(None if not offsets else offsets[0] if len(offsets) == 1 else torch.stack(offsets).sum(0))
    return Packed(a, b, bias)


def forward(
    x: Tensor, projections: Sequence[LoraProjection], packed: Packed, dtypes: Dtypes, seeds: Sequence[Tensor | None]
) -> tuple[list[Tensor], Tensor | None]:
    """All outputs and S.

    Args:
        x: (..., in_features), any floating dtype.
        projections, packed, dtypes, seeds: the group; seeds[i] is None where projection i drops nothing.

    Returns:
        (outputs, s): outputs[i] is (..., out_features) and no view; s is (tokens, total rank) or None.
    """
    outputs = [x.new_empty((*x.shape[:-1], p.weight.shape[0]), dtype=dtypes.out) for p in projections]
    rows = [y.view(-1, y.shape[-1]) for y in outputs]
    return outputs, forward_into(rows, x.reshape(-1, x.shape[-1]), projections, packed, dtypes, seeds)


def forward_into(
    outputs: Sequence[Tensor],
    x: Tensor,
    projections: Sequence[LoraProjection],
    packed: Packed,
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
) -> Tensor | None:
    """`forward` into matrices (tokens, out_features) of dtype `dtypes.out`, columns contiguous; returns S."""
    inputs = x.to(dtypes.compute)
    s = _down(x, projections, packed, dtypes, seeds)
    column = 0
    for i, projection in enumerate(projections):
        update, up = None, packed.b[i]
        if up is not None and s is not None:
            update = (s[:, column : column + projection.rank], up)
            column += projection.rank
        _project(outputs[i], inputs, projection, update, packed.bias[i], dtypes)
    return s


def backward(
    x: Tensor | None,
    s: Tensor | None,
    dys: Sequence[Tensor | None],
    projections: Sequence[LoraProjection],
    packed: Packed,
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
    dx_dtype: torch.dtype | None,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradients of x and of `LoraProjection.tensors()` of each projection.

    Args:
        x: (tokens, in_features) as kept by forward; None when no adapter's `a` is trained.
        s, dys, projections, packed, dtypes, seeds, dx_dtype, needs: as `backward_without_input`.

    Returns:
        (dx, grads): dx (tokens, in_features) in any of the dtypes given, grads in the parameters' dtypes; None where
        not wanted.
    """
    dx, ds, grads = backward_without_input(s, dys, projections, packed, dtypes, seeds, dx_dtype, needs)
    if ds is not None and x is not None:
        down_gradients(ds, x.to(dtypes.lora), projections, seeds, needs, grads)
    return dx, grads


def backward_without_input(
    s: Tensor | None,
    dys: Sequence[Tensor | None],
    projections: Sequence[LoraProjection],
    packed: Packed,
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
    dx_dtype: torch.dtype | None,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, Tensor | None, list[list[Tensor | None]]]:
    """All of `backward` that does not read x.

    Args:
        s: (tokens, total rank) as kept by forward; None when no adapter's `b` is trained.
        dys: gradient of each output, (tokens, out_features) of dtype `dtypes.out`, or None where it is zero.
        dx_dtype: dtype of x, whose gradient is summed in it where it is wider than `dtypes.compute`; None when no
            gradient of x is wanted.
        needs: which other gradients are wanted; needs[i] runs parallel to projections[i].tensors().

    Returns:
        (dx, ds, grads): as `backward`, and dS, (tokens, total rank), for `down_gradients`.
    """
    grads: list[list[Tensor | None]] = [[None] * len(flags) for flags in needs]
    dx: Tensor | None = None
    ds = empty_ds(dys, packed)
    column = 0
    for i, projection in enumerate(projections):
        first, column = column, column + projection.rank
        dy = dys[i]
        if dy is None:
            continue
        dy = _rows_contiguous(dy)
        if dx_dtype is not None:
            dx = _accumulate_input_gradient(dx, dy.to(dtypes.compute), projection.weight, dx_dtype)
        bias_gradients(dy, projection, needs[i], grads[i])
        up = packed.b[i]
        if ds is None or up is None:
            continue
        dy = dy.to(dtypes.lora)
        torch.mm(dy, up, out=ds[:, first:column])
        if s is not None:
            _up_gradients(dy, s[:, first:column], projection, needs[i], grads[i])
    if dx is not None and ds is not None and packed.a is not None:
        dx = _add_adapter_input_gradient(dx, ds, packed.a, projections, seeds)
    return dx, ds, grads


def _scaled(tensor: Tensor, scaling: float | Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if isinstance(scaling, (int, float)) and scaling == 1.0 else (tensor * scaling).to(dtype)


def _down(
    x2: Tensor, projections: Sequence[LoraProjection], packed: Packed, dtypes: Dtypes, seeds: Sequence[Tensor | None]
) -> Tensor | None:
    """S = dropout(x) A^T: one product without dropout, one for each adapter with it."""
    if packed.a is None:
        return None
    inputs = x2.to(dtypes.lora)
    if all(seed is None for seed in seeds):
        return torch.mm(inputs, packed.a.t())
    s = inputs.new_empty((inputs.shape[0], packed.a.shape[0]))
    for first, last, seed, p, stream in adapter_columns(projections, seeds):
        dropped = inputs if seed is None else dropout(inputs, seed, p, stream)
        torch.mm(dropped, packed.a[first:last].t(), out=s[:, first:last])
    return s


def _project(
    y: Tensor,
    inputs: Tensor,
    projection: LoraProjection,
    update: tuple[Tensor, Tensor] | None,
    lora_bias: Tensor | None,
    dtypes: Dtypes,
) -> None:
    """y[:] = inputs W^T + bias + S (scaling B)^T + lora_bias, the sum in the widest of the dtypes."""
    base = y if dtypes.compute == dtypes.out else y.new_empty(y.shape, dtype=dtypes.compute)
    own = projection.weight.linear(inputs)
    bias = None if projection.bias is None else projection.bias.detach().to(dtypes.compute)
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


def _accumulate_input_gradient(dx: Tensor | None, dy: Tensor, weight: FrozenWeight, dx_dtype: torch.dtype) -> Tensor:
    """dx + dy W, one product; summed apart where x is wider than the products, as autograd would."""
    own = weight.linear_t(dy)
    if own is None:
        values = decoded(weight, dy.dtype)
        if dx is not None and dx.dtype == dy.dtype:
            return torch.addmm(dx, dy, values, out=dx)
        own = torch.mm(dy, values)
    return own.to(torch.promote_types(own.dtype, dx_dtype)) if dx is None else dx.add_(own)


def _add_adapter_input_gradient(
    dx: Tensor, ds: Tensor, a: Tensor, projections: Sequence[LoraProjection], seeds: Sequence[Tensor | None]
) -> Tensor:
    """dx + dropout(dS A), summed in the wider of the two dtypes."""
    wide = torch.promote_types(dx.dtype, ds.dtype)
    if all(seed is None for seed in seeds):
        return torch.addmm(dx, ds, a, out=dx) if dx.dtype == ds.dtype else dx.to(wide).add_(torch.mm(ds, a))
    dx = dx.to(wide)
    for first, last, seed, p, stream in adapter_columns(projections, seeds):
        part = torch.mm(ds[:, first:last], a[first:last])
        dx.add_(part if seed is None else dropout(part, seed, p, stream))
    return dx


def _up_gradients(
    dy: Tensor, s: Tensor, projection: LoraProjection, needs: Sequence[bool], grads: list[Tensor | None]
) -> None:
    """dB = scaling * dy^T S, one product for all adapters of the projection."""
    wanted = [j for j in range(len(projection.adapters)) if needs[3 * j + 2]]
    if not wanted:
        return
    db = _mm_wide(dy.t(), s, projection.adapters[wanted[0]].b.dtype)
    column = 0
    for j, adapter in enumerate(projection.adapters):
        first, column = column, column + adapter.rank
        if j in wanted:
            grads[3 * j + 2] = (db[:, first:column] * adapter.scaling).to(adapter.b.dtype)


def down_gradients(
    ds: Tensor,
    x: Tensor,
    projections: Sequence[LoraProjection],
    seeds: Sequence[Tensor | None],
    needs: Sequence[Sequence[bool]],
    grads: list[list[Tensor | None]],
) -> None:
    """dA = dS^T dropout(x), one product for the whole group without dropout."""
    joint = None
    if all(seed is None for seed in seeds):
        joint = _mm_wide(ds.t(), x, next(a.a.dtype for projection in projections for a in projection.adapters))
    columns = adapter_columns(projections, seeds)
    for i, projection in enumerate(projections):
        for j, adapter in enumerate(projection.adapters):
            first, last, seed, p, stream = next(columns)
            if not needs[i][3 * j + 1]:
                continue
            if joint is not None:
                da = joint[first:last]
            else:
                dropped = x if seed is None else dropout(x, seed, p, stream)
                da = _mm_wide(ds[:, first:last].t(), dropped, adapter.a.dtype)
            grads[i][3 * j + 1] = da.to(adapter.a.dtype)


def _mm_wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, kept in fp32 where the product of 16-bit operands can be had so and the result is wanted in fp32."""
    if a.is_cuda and a.dtype != torch.float32 and dtype == torch.float32 and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)


def _rows_contiguous(dy: Tensor) -> Tensor:
    """Gradients can be expanded (a sum's is one number): copy once what each product would otherwise copy again."""
    return dy if dy.stride(-1) == 1 and dy.stride(0) >= dy.shape[1] else dy.contiguous()
