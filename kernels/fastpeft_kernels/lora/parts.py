"""The pieces of a group's forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.scratch import scratch
from ..weights import FrozenWeight
from ..weights.held import held
from . import mixed
from .projection import Group, LoraProjection, Mask, Packed, trains_a
from .rank_products import both_gradients, down_gradient, input_gradient, project_down


def decoded(weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
    """The dense values for one product, in a warm buffer that the next decode overwrites unless they lie ready."""
    ready = weight.ready(dtype)
    if ready is not None:
        return ready
    if (waiting := held(weight, dtype)) is not None:
        return waiting
    if not weight.fills:
        return weight.decode(dtype=dtype)
    return weight.decode(out=scratch(weight.shape, dtype, weight.device))


def empty_ds(dys: Sequence[Tensor | None], group: Group, packed: Packed) -> Tensor | None:
    """Room for dS; zeros where an output without gradient leaves its columns unwritten."""
    given = [dy for dy in dys if dy is not None]
    if packed.a is None or not given:
        return None
    shape = (given[0].shape[0], sum(group.widths()))
    return packed.a.new_empty(shape) if len(given) == len(dys) else packed.a.new_zeros(shape)


def bias_gradients(dy: Tensor, projection: LoraProjection, needs: Sequence[bool], grads: list[Tensor | None]) -> None:
    """Of the projection's bias and of its adapters', from one sum over the tokens."""
    biases = [(projection.bias, 1.0), *((adapter.bias, adapter.scaling) for adapter in projection.adapters)]
    total: Tensor | None = None
    for i, (bias, factor) in enumerate(biases):
        if needs[3 * i] and bias is not None:
            if total is None:
                total = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
            grads[3 * i] = (total * factor).to(bias.dtype)


def _scaled(tensor: Tensor, scaling: float | Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if isinstance(scaling, (int, float)) and scaling == 1.0 else (tensor * scaling).to(dtype)


def summed_bias(projection: LoraProjection, dtype: torch.dtype) -> Tensor | None:
    """The sum of its adapters' scaling * bias, or None."""
    offsets = [_scaled(a.bias.detach(), a.scaling, dtype) for a in projection.adapters if a.bias is not None]
    return None if not offsets else offsets[0] if len(offsets) == 1 else torch.stack(offsets).sum(0)


def pack(projections: Sequence[LoraProjection], dtype: torch.dtype, one_a: bool = False) -> Packed:
    """Cast, scale and join the adapters, once for the whole group."""
    down = [adapter.a.detach() for projection in projections for adapter in projection.adapters]
    down = down[:1] if one_a else down
    a = None if not down else (down[0] if len(down) == 1 else torch.cat(down)).to(dtype)
    b: list[Tensor | None] = []
    bias: list[Tensor | None] = []
    for projection in projections:
        up = [_scaled(adapter.b.detach(), adapter.scaling, dtype) for adapter in projection.adapters]
        b.append(None if not up else up[0] if len(up) == 1 else torch.cat(up, dim=1))
        bias.append(summed_bias(projection, dtype))
    return Packed(a, b, bias)


def down_projection(x2: Tensor, group: Group, packed: Packed) -> Tensor | None:
    """S = dropout(x) A^T: one product without dropout, one for each adapter with it but those of `dora`."""
    if packed.a is None:
        return None
    inputs = x2.to(group.dtypes.lora)
    if group.adapter_index is not None:
        return mixed.down_projection(inputs, group, packed)
    if not group.drops:
        return project_down(inputs, packed.a.t(), backend=group.backend)
    s = inputs.new_empty((inputs.shape[0], packed.a.shape[0]))
    for first, last, mask, whole in group.adapter_columns():
        if whole:
            continue
        project_down(inputs, packed.a[first:last].t(), s[:, first:last], mask, group.backend)
    return s


def adapter_input_gradient(ds: Tensor, a: Tensor, group: Group, dx: Tensor | None = None) -> Tensor | None:
    """dropout(dS A), or added to dx, in the wider of the two dtypes: one product without dropout; none of `dora`'s."""
    if group.adapter_index is not None:
        return mixed.input_gradient(ds, a, group, dx)
    if not group.drops:
        return input_gradient(ds, a, dx, None, group.backend)
    for first, last, mask, whole in group.adapter_columns():
        if whole:
            continue
        dx = input_gradient(ds[:, first:last], a[first:last], dx, mask, group.backend)
    return dx


def up_gradients(
    dy: Tensor,
    s: Tensor | None,
    projection: LoraProjection,
    needs: Sequence[bool],
    grads: list[Tensor | None],
    *,
    up: Tensor,
    ds: Tensor,
    backend: str,
) -> None:
    """ds[:] = dy up, and dB = scaling * dy^T S, one product for all adapters of the projection."""
    wanted = [j for j in range(len(projection.adapters)) if needs[3 * j + 2]]
    if s is None or not wanted:
        project_down(dy, up, ds, None, backend)
        return
    dtype = projection.adapters[wanted[0]].b.dtype
    if len(projection.adapters) == 1:
        grads[2] = both_gradients(dy, up, s, ds, dtype, projection.adapters[0].scaling, backend)
        return
    db = both_gradients(dy, up, s, ds, dtype, 1.0, backend)
    column = 0
    for j, adapter in enumerate(projection.adapters):
        first, column = column, column + adapter.rank
        if j in wanted:
            grads[3 * j + 2] = (db[:, first:column] * adapter.scaling).to(adapter.b.dtype)


def down_gradients(
    ds: Tensor,
    x: Tensor,
    group: Group,
    needs: Sequence[Sequence[bool]],
    grads: list[list[Tensor | None]],
) -> None:
    """dA = dS^T dropout(x), one product for the whole group without dropout."""

    def product(ds: Tensor, mask: Mask | None) -> Tensor:
        wanted = next(adapter.a.dtype for projection in group.projections for adapter in projection.adapters)
        return down_gradient(ds, x, wanted, mask, group.backend)

    if not any(trains_a(flags) for flags in needs):
        return
    if group.adapter_index is not None:
        mixed.down_gradients(ds, x, group, needs, grads)
        return
    joint = None if group.drops else product(ds, None)
    columns = group.adapter_columns()
    for i, projection in enumerate(group.projections):
        for j, adapter in enumerate(projection.adapters):
            first, last, mask, _ = next(columns)
            if needs[i][3 * j + 1]:
                da = product(ds[:, first:last], mask) if joint is None else joint[first:last]
                grads[i][3 * j + 1] = da.to(adapter.a.dtype)


def rows_contiguous(dy: Tensor) -> Tensor:
    """Gradients can be expanded (a sum's is one number): copy once what each product would otherwise copy again."""
    return dy if dy.stride(-1) == 1 and dy.stride(0) >= dy.shape[1] else dy.contiguous()
