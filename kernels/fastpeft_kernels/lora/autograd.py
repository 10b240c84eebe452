"""Forward and backward of a group of LoRA projections as one autograd function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.device import autocast_off
from ..weights.base import Weighted
from . import direct, dora, library
from .projection import Group, LoraProjection, have_one_a, trains_a, trains_b
from .remade import Remade


class LoraGroup(torch.autograd.Function):
    """Keeps x (once, in the dtype of the products) and S = x A^T; no decoded weight, no packed or cast adapter.

    Where a magnitude is trained, its projection's result before the gain too: see `dora`.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        group: Group,
        made: Remade | None,
        x: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        projections = group.projections
        needs = split_flags(ctx.needs_input_grad[3:], projections)
        ctx.group = (group, needs)
        ctx.input = (x.shape, x.dtype, None if made is None else made.function)
        ctx.stamps = [projection.weight.stamp() for projection in projections]
        x = group.dtypes.cast_once(x)
        kept: list[dora.Kept | None] = []
        outputs, s = _compute(x, group, kept)
        kept = dora.read_by_backward(kept, needs)
        ctx.save_for_backward(
            (x if made is None else made.source) if any(trains_a(flags) for flags in needs) else None,
            s if any(trains_b(flags) for flags in needs) else None,
            *dora.flat(kept),
            *tensors_read_again(projections),
        )
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys: Tensor | None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        group, needs = ctx.group
        shape, dtype, function = ctx.input
        x, s, *kept = ctx.saved_tensors
        with in_use(group.projections):
            if x is not None and function is not None:
                x = group.dtypes.cast_once(Remade(x, function).again())
            for projection, stamp in zip(group.projections, ctx.stamps, strict=True):
                projection.weight.check_unchanged(stamp)
            dx, grads = library.backward(
                None if x is None else x.reshape(-1, x.shape[-1]),
                s,
                [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys],
                group,
                library.pack(group),
                dtype if ctx.needs_input_grad[2] else None,
                needs,
                dora.unflatten(group.projections, kept),
            )
        # PEFT's layer that was not called leaves its parameters without gradients, not with zeros
        flat = [None if dy is None else grad for dy, found in zip(dys, grads, strict=True) for grad in found]
        return None, None, None if dx is None else dx.view(shape).to(dtype), *flat


def apply(x: Tensor, group: Group, made: Remade | None = None) -> tuple[Tensor, ...]:
    """The group's outputs, differentiable where grad mode and the inputs ask for it. Autocast must be off.

    Args:
        made: how backward makes x again, which then is not kept.
    """
    if group.adapter_index is None and group.backend != "triton" and have_one_a(group.projections, group.seeds):
        group = replace(group, one_a=True)
    if served := direct.serves(x, group):
        return direct.apply(x, group, served, made)
    tensors = [tensor for projection in group.projections for tensor in projection.tensors()]
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors)):
        return LoraGroup.apply(group, made, x, *tensors)  # type: ignore[no-any-return]
    return tuple(_compute(x.detach(), group)[0])


def _compute(x: Tensor, group: Group, kept: list[dora.Kept | None] | None = None) -> tuple[list[Tensor], Tensor | None]:
    with in_use(group.projections):
        return library.forward(x, group, library.pack(group), kept)


@contextmanager
def in_use(projections: Sequence[Weighted]) -> Iterator[None]:
    """The weights are brought and let go again; autocast is off, also in a backward that is called under it."""
    with autocast_off(projections[0].weight.device):
        try:
            for projection in projections:
                projection.weight.prefetch()
            yield
        finally:
            for projection in projections:
                projection.weight.release()


def tensors_read_again(projections: Sequence[LoraProjection]) -> list[Tensor]:
    """What backward reads through `projections`; to be saved, for torch to notice a write before it."""
    found = [t for p in projections for a in p.adapters for t in (a.a, a.b, a.scaling) if isinstance(t, Tensor)]
    return found + [p.magnitude for p in projections if p.magnitude is not None]


def split_flags(flags: Sequence[bool], projections: Sequence[LoraProjection]) -> list[Sequence[bool]]:
    """One flag for each of all projections' `tensors()`, by projection."""
    parts, last = [], 0
    for projection in projections:
        first, last = last, last + 2 + 3 * len(projection.adapters)
        parts.append(flags[first:last])
    return parts
