"""LoRA projections on our own Triton kernels: `pack`, `forward` and `backward` as in `library.py`.

For n projections of one input, without dropout: forward packs in one launch, reads x once for S, and writes each output
once with the update in the same accumulator. Backward reads each dY once for dS and dB at small rank, adds dS A inside
the first product of dX, and reads x once for dA. Dropout is applied where values are read; it is never stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..common.device import device_capability, hopper_dots_safe
from ..common.random import TRITON_DTYPES
from ..weights import FrozenWeight
from .backward import columns_contiguous, lora_down_bwd_input_, lora_down_bwd_weight, lora_sum, lora_up_bwd
from .configs import UP
from .forward import lora_down, lora_down_fwd_kernel, lora_linear
from .linear import chosen_linear
from .packing import pack
from .parts import bias_gradients, decoded, empty_ds
from .projection import Dtypes, Group, LoraProjection, Packed

__all__ = ["backward", "forward", "pack", "refusal"]


def refusal(x: Tensor, group: Group) -> str | None:
    """Why this path cannot serve the group; None when it can."""
    if x.device.type not in ("cpu", "cuda"):
        return f"expected x on a GPU that Triton serves, got {x.device}"
    if x.device.type == "cpu" and isinstance(lora_down_fwd_kernel, triton.runtime.JITFunction):
        return "expected x on a GPU (or Triton's interpreter), got a tensor on the CPU"
    capability = device_capability(x.device)
    if capability is not None and capability < 80:
        return f"expected compute capability 8.0 or later, where Triton has tensor cores, got {capability / 10}"
    dtypes, parameters = group.dtypes, {a.a.dtype for projection in group.projections for a in projection.adapters}
    for dtype in {x.dtype, dtypes.compute, dtypes.lora, dtypes.out, *parameters}:
        if dtype not in TRITON_DTYPES:
            return f"expected fp16, bf16 or fp32 throughout, got {dtype}"
        if x.device.type == "cpu" and dtype == torch.bfloat16:
            return f"expected fp32 or fp16 in Triton's interpreter, which computes bf16 wrongly, got {dtype}"
    return hopper_dots_safe(x.device) if group.drops else None


def forward(x: Tensor, group: Group, packed: Packed) -> tuple[list[Tensor], Tensor | None]:
    """All outputs and S; arguments and results as for `library.forward`."""
    dtypes = group.dtypes
    x2 = x.reshape(-1, x.shape[-1])
    inputs = x2.to(dtypes.compute)
    s = _down(x2, group, packed)
    outputs, column = [], 0
    for i, projection in enumerate(group.projections):
        y = x.new_empty((*x.shape[:-1], projection.weight.shape[0]), dtype=dtypes.out)
        update: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        if (up := packed.b[i]) is not None and s is not None:
            update = (s[:, column : column + projection.rank], up)
            column += projection.rank
        bias = _total_bias(projection.bias, packed.bias[i], dtypes)
        _project(y.view(-1, y.shape[-1]), inputs, projection.weight, update, bias, dtypes)
        outputs.append(y)
    return outputs, s


def backward(
    x: Tensor | None,
    s: Tensor | None,
    dys: Sequence[Tensor | None],
    group: Group,
    packed: Packed,
    dx_dtype: torch.dtype | None,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradients of x and of every projection's tensors; arguments and results as for `library.backward`."""
    grads: list[list[Tensor | None]] = [[None] * len(flags) for flags in needs]
    given = [i for i, dy in enumerate(dys) if dy is not None]
    if not given:
        return None, grads
    dys = [None if dy is None else columns_contiguous(dy) for dy in dys]
    ds = empty_ds(dys, packed) if dx_dtype is not None or x is not None else None
    column = 0
    for i, projection in enumerate(group.projections):
        first, column = column, column + projection.rank
        dy, up = dys[i], packed.b[i]
        if dy is None:
            continue
        bias_gradients(dy, projection, needs[i], grads[i])
        if up is not None:
            columns = slice(first, column)
            s_i, ds_i = None if s is None else s[:, columns], None if ds is None else ds[:, columns]
            _up_gradients(dy, up, s_i, ds_i, projection, needs[i], grads[i])
    dx = None if dx_dtype is None else _input_gradient(dys, ds, given, group, packed, dx_dtype)
    if ds is not None and x is not None:
        _down_gradients(ds, x, group, needs, grads)
    return dx, grads


def _down(x2: Tensor, group: Group, packed: Packed) -> Tensor | None:
    """S: one launch without dropout, one for each adapter with it. The cast to the adapters' dtype is in the kernel."""
    if packed.a is None:
        return None
    if not group.drops:
        return lora_down(x2, packed.a)
    s = packed.a.new_empty((x2.shape[0], packed.a.shape[0]))
    for first, last, seed, p, stream in group.adapter_columns():
        lora_down(x2, packed.a[first:last], seed=seed, p=p, stream=stream, out=s[:, first:last])
    return s


def _project(
    y: Tensor,
    inputs: Tensor,
    weight: FrozenWeight,
    update: tuple[Tensor, Tensor] | tuple[None, None],
    bias: Tensor | None,
    dtypes: Dtypes,
) -> None:
    """y[:] = inputs W^T + S (scaling B)^T + bias."""
    own = weight.linear(inputs)
    s, b = update
    if own is None:
        chosen_linear(inputs, decoded(weight, dtypes.compute), s, b, bias, out=y)
        return
    if s is None or b is None:
        y.copy_(own if bias is None else own + bias)
        return
    base = y if dtypes.out == own.dtype else torch.empty_like(own)
    base.copy_(own)
    lora_linear(s, b, bias=bias, out=base, accumulate=True)
    if base is not y:
        y.copy_(base)


def _total_bias(bias: Tensor | None, lora_bias: Tensor | None, dtypes: Dtypes) -> Tensor | None:
    base = None if bias is None else bias.detach().to(dtypes.compute)
    return lora_bias if base is None else base if lora_bias is None else base + lora_bias


def _up_gradients(
    dy: Tensor,
    up: Tensor,
    s: Tensor | None,
    ds: Tensor | None,
    projection: LoraProjection,
    needs: Sequence[bool],
    grads: list[Tensor | None],
) -> None:
    """dS = dY (scaling B) and dB = scaling * dY^T S, from one read of dY where the rank allows."""
    wanted = s is not None and any(needs[2::3])
    one_read = ds is not None and wanted and dy.dtype == up.dtype != torch.float32 and up.shape[1] <= UP[0].block_r
    if one_read and s is not None and ds is not None:
        partial = lora_up_bwd(dy, up, s, ds)
    else:
        if ds is not None:
            lora_down(dy, up.t(), out=ds)
        if not wanted or s is None:
            return
        partial = lora_down_bwd_weight(dy, s, features_first=True)
    column = 0
    for j, adapter in enumerate(projection.adapters):
        first, column = column, column + adapter.rank
        if needs[3 * j + 2]:
            out = torch.empty_like(adapter.b, memory_format=torch.contiguous_format)
            grads[3 * j + 2] = lora_sum(partial[:, :, first:column], out, adapter.scaling)


def _input_gradient(
    dys: Sequence[Tensor | None],
    ds: Tensor | None,
    given: list[int],
    group: Group,
    packed: Packed,
    dx_dtype: torch.dtype,
) -> Tensor | None:
    """The sum of dY W and dropout(dS A): the latter inside the first product when nothing is dropped.

    Summed in the widest of the dtypes in which the library would sum it.
    """
    dx: Tensor | None = None
    dtypes, inside = group.dtypes, ds is not None and not group.drops
    wide = torch.promote_types(dtypes.compute, dx_dtype)
    if ds is not None and not inside:
        wide = torch.promote_types(wide, dtypes.lora)
    for i in given:
        dy, weight = dys[i], group.projections[i].weight
        assert dy is not None
        dy = dy.to(dtypes.compute)
        own = weight.linear_t(dy)
        if own is not None:
            dx = columns_contiguous(own.to(wide)) if dx is None else dx.add_(own)
        else:
            w = decoded(weight, dtypes.compute).t()
            s, b = (ds, packed.a.t()) if inside and ds is not None and packed.a is not None else (None, None)
            out = dy.new_empty((dy.shape[0], weight.shape[1]), dtype=wide) if dx is None else dx
            dx = chosen_linear(dy, w, s, b, out=out, accumulate=dx is not None)
            ds = None if inside else ds
    if dx is None or ds is None or packed.a is None:
        return dx
    for first, last, seed, p, stream in [(0, ds.shape[1], None, 0.0, 0)] if inside else group.adapter_columns():
        lora_down_bwd_input_(dx, ds[:, first:last], packed.a[first:last], seed=seed, p=p, stream=stream)
    return dx


def _down_gradients(
    ds: Tensor,
    x: Tensor,
    group: Group,
    needs: Sequence[Sequence[bool]],
    grads: list[list[Tensor | None]],
) -> None:
    """dA = dS^T dropout(x), from one read of x for the whole group without dropout."""
    joint = None if group.drops else lora_down_bwd_weight(x, ds)
    columns = group.adapter_columns()
    for i, projection in enumerate(group.projections):
        for j, adapter in enumerate(projection.adapters):
            first, last, seed, p, stream = next(columns)
            if not needs[i][3 * j + 1]:
                continue
            if joint is not None:
                partial = joint[:, first:last]
            else:
                partial = lora_down_bwd_weight(x, ds[:, first:last], seed=seed, p=p, stream=stream)
            grads[i][3 * j + 1] = lora_sum(partial, torch.empty_like(adapter.a, memory_format=torch.contiguous_format))
