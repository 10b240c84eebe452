"""A group of LoRA projections as torch.library ops, for torch.compile.

Seen from outside, forward is one node that keeps x and S = x A^T (and with a magnitude what `dora` says), and backward
is another: no compiler can come to keep a decoded weight, a dropout mask or a cast adapter between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import dora, library
from .autograd import in_use
from .layout import FlatGroup, flatten_group, unflatten_group
from .projection import Group, trains_a, trains_b


def apply(x: Tensor, group: Group) -> tuple[Tensor, ...]:
    """The group's outputs, differentiable. Autocast must be off."""
    x = group.dtypes.cast_once(x)
    tensors, numbers, layout = flatten_group(group)
    return tuple(lora_group_op(x, tensors, numbers, layout)[: len(group.projections)])


@torch.library.custom_op("fastpeft::lora_group", mutates_args=())
def lora_group_op(x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float], layout: str) -> list[Tensor]:
    """The outputs of `library.forward`, then S (tokens, total rank), then `dora.flat` of what it keeps."""
    group = unflatten_group(tensors, numbers, layout).group
    kept: list[dora.Kept | None] = []
    with in_use(group.projections):
        outputs, s = library.forward(x, group, library.pack(group), kept)
    return [*outputs, _no_s(x, group) if s is None else s, *[t for t in dora.flat(kept) if t is not None]]


@lora_group_op.register_fake
def _(x: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float], layout: str) -> list[Tensor]:
    group = unflatten_group(tensors, numbers, layout).group
    outputs = [x.new_empty((*x.shape[:-1], p.weight.shape[0]), dtype=group.dtypes.out) for p in group.projections]
    kept = [
        t
        for p in group.projections
        if p.magnitude is not None
        for t in (
            x.new_empty((prod(x.shape[:-1]), p.weight.shape[0]), dtype=dora.dtype_of_z(group.dtypes)),
            x.new_empty(p.weight.shape[0], dtype=dora.wide(group.dtypes.lora)),
        )
    ]
    return [*outputs, _no_s(x, group), *kept]


@torch.library.custom_op("fastpeft::lora_group_backward", mutates_args=())
def lora_group_backward_op(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    s: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    layout: str,
    dx_dtype: torch.dtype | None,
    wanted: Sequence[bool],
    kept: Sequence[Tensor | None],
) -> list[Tensor]:
    """`library.backward`: dx unless dx_dtype is None, then the gradients of the tensors that are wanted, in order."""
    flat = unflatten_group(tensors, numbers, layout)
    group = flat.group
    with in_use(group.projections):
        dx, grads = library.backward(
            None if x is None else x.reshape(-1, x.shape[-1]),
            s,
            [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys],
            group,
            library.pack(group),
            dx_dtype,
            flat.flags(wanted),
            dora.unflatten(group.projections, kept),
        )
    results = gradients_in_order(flat, grads)
    if dx is not None and dx_dtype is not None:
        results.insert(0, dx.reshape(*_lead(dys), dx.shape[-1]).to(dx_dtype).contiguous())
    return results


@lora_group_backward_op.register_fake
def _(
    dys: Sequence[Tensor | None],
    x: Tensor | None,
    s: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    layout: str,
    dx_dtype: torch.dtype | None,
    wanted: Sequence[bool],
    kept: Sequence[Tensor | None],
) -> list[Tensor]:
    return empty_gradients(_lead(dys), tensors, numbers, layout, dx_dtype, wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    x, tensors, numbers, layout = inputs
    ctx.layout, ctx.dtype = (numbers, layout), x.dtype
    flags = unflatten_group(tensors, *ctx.layout).flags(ctx.needs_input_grad[1:])  # flat here, nested in backward
    projections = unflatten_group(tensors, *ctx.layout).group.projections
    ctx.outputs, s = len(projections), output[len(projections)]
    kept = dora.read_by_backward(dora.unflatten(projections, output[ctx.outputs + 1 :]), flags)
    ctx.kept = [t is not None for t in dora.flat(kept)]
    ctx.keeps_x, ctx.keeps_s = any(trains_a(part) for part in flags), any(trains_b(part) for part in flags)
    held = [t for t in dora.flat(kept) if t is not None]
    ctx.save_for_backward(*[x] * ctx.keeps_x, *[s] * ctx.keeps_s, *held, *tensors)


def _backward(ctx: Any, dys: list[Tensor | None]) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    x = tensors.pop(0) if ctx.keeps_x else None
    s = tensors.pop(0) if ctx.keeps_s else None
    kept = [tensors.pop(0) if held else None for held in ctx.kept]
    dys, needs = dys[: ctx.outputs], ctx.needs_input_grad  # what follows is S and what else is kept
    tracked = unflatten_group(tensors, *ctx.layout).tracked
    given = [place for places, dy in zip(tracked, dys, strict=True) if dy is not None for place in places]
    wanted = [flag and place in given for place, flag in enumerate(needs[1])]
    dx_dtype = ctx.dtype if needs[0] and given else None
    found = iter(lora_group_backward_op(dys, x, s, tensors, *ctx.layout, dx_dtype, wanted, kept))
    dx = None if dx_dtype is None else next(found)
    return dx, [next(found) if flag else None for flag in wanted], no_gradients(ctx.layout[0]), None


lora_group_op.register_autograd(_backward, setup_context=_setup)


def _no_s(x: Tensor, group: Group) -> Tensor:
    return x.new_empty((prod(x.shape[:-1]), sum(group.widths())), dtype=group.dtypes.lora)


def _lead(dys: Sequence[Tensor | None]) -> torch.Size:
    """The leading sizes that all outputs share."""
    return next(dy.shape[:-1] for dy in dys if dy is not None)


def no_gradients(numbers: Sequence[float]) -> list[None] | None:
    """What torch wants for an op's list of numbers, which is one of tensors to it when it is empty."""
    return None if numbers else []


def empty_gradients(
    lead: Sequence[int],
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    layout: str,
    dx_dtype: torch.dtype | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """What a backward op gives, without values: dx (*lead, in_features) unless dx_dtype is None, then the wanted."""
    results = [torch.empty_like(tensor) for tensor, flag in zip(tensors, wanted, strict=True) if flag]
    if dx_dtype is not None:
        in_features = unflatten_group(tensors, numbers, layout).group.projections[0].weight.shape[1]
        results.insert(0, tensors[0].new_empty((*lead, in_features), dtype=dx_dtype))
    return results


def gradients_in_order(flat: FlatGroup, grads: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
    """What of a library's `grads` there is, in the order of the tensors that they belong to."""
    by_place = {
        place: grad
        for places, found in zip(flat.tracked, grads, strict=True)
        for place, grad in zip(places, found, strict=True)
        if place is not None and grad is not None
    }
    return [_own(by_place[place]) for place in sorted(by_place)]


def _own(grad: Tensor) -> Tensor:
    """Results of an op must not share memory."""
    return grad if grad.untyped_storage().nbytes() == grad.nbytes else grad.clone()
