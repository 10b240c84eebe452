"""The MLP for autograd: one node that keeps and computes all that backward reads, and one that makes the result.

Activation checkpointing that is not reentrant runs a forward again until all is there that it saved, and what a node
saves is looked at when the node's forward ends. So the down projection, of which backward reads nothing, stands in a
node of its own that saves nothing: where no later part of the checkpointed layer saves anything, it is not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..lora.autograd import in_use, split_flags, tensors_read_again
from ..lora.projection import Dtypes, have_one_a
from . import library, tiled
from .library import Kept, Middle
from .structure import Mlp
from .tiled import Tiles


class LoraMlpUpToDown(torch.autograd.Function):
    """Keeps x, S of each projection and, if `keep`, gate and up; else those are computed again, but never down.

    Its output stands for the result: its gradient is the result's. It has the shape and one number of storage.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None], keep: bool, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Middle]:
        needs = split_flags(ctx.needs_input_grad[5:], mlp.projections)
        ctx.group = (mlp, dtypes, seeds, needs)
        ctx.input = (x.shape, x.dtype)
        ctx.stamps = [projection.weight.stamp() for projection in mlp.projections]
        x = dtypes.cast_once(x)
        with in_use(mlp.inner):
            middle, pre, s = library.up_to_down(x.reshape(-1, x.shape[-1]), mlp, dtypes, seeds)
        read = library.read_by_backward(ctx.needs_input_grad[4], needs, keep)
        kept = [t if wanted else None for t, wanted in zip((x, s, pre, middle.s_down), read, strict=True)]
        ctx.save_for_backward(*kept, *tensors_read_again(mlp.projections))
        return stand_in(x, mlp, dtypes), middle

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, _: None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        mlp, dtypes, seeds, needs = ctx.group
        shape, dtype = ctx.input
        x, s, pre, s_down, *_tensors = ctx.saved_tensors
        with in_use(mlp.projections):
            for projection, stamp in zip(mlp.projections, ctx.stamps, strict=True):
                projection.weight.check_unchanged(stamp)
            dx, grads = library.backward(
                dy.reshape(-1, dy.shape[-1]),
                Kept(None if x is None else x.reshape(-1, x.shape[-1]), s, pre, s_down),
                mlp,
                dtypes,
                seeds,
                dtype if ctx.needs_input_grad[4] else None,
                needs,
                spend=not graph_is_kept(dy.device),
            )
        flat = [grad for group in grads for grad in group]
        return None, None, None, None, None if dx is None else dx.view(shape).to(dtype), *flat


def graph_is_kept(device: torch.device) -> bool:
    """Whether this pass leaves what was saved for another: `retain_graph=True`, or a CUDA graph that repeats it."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


class LoraMlpTiled(torch.autograd.Function):
    """Keeps x; what stands for the result, as there, and nothing computed: that is all of a recomputation."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None], tile: int, x: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tiles]:
        needs = split_flags(ctx.needs_input_grad[5:], mlp.projections)
        ctx.group = (mlp, dtypes, seeds, needs, tile)
        ctx.input = (x.shape, x.dtype)
        ctx.stamps = [projection.weight.stamp() for projection in mlp.projections]
        x = dtypes.cast_once(x)
        ctx.save_for_backward(x, *tensors_read_again(mlp.projections))
        return stand_in(x, mlp, dtypes), Tiles(x.reshape(-1, x.shape[-1]), mlp, dtypes, seeds, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, _: None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        mlp, dtypes, seeds, needs, tile = ctx.group
        shape, dtype = ctx.input
        x, *_tensors = ctx.saved_tensors
        with in_use(mlp.projections):
            for projection, stamp in zip(mlp.projections, ctx.stamps, strict=True):
                projection.weight.check_unchanged(stamp)
            dx_dtype = dtype if ctx.needs_input_grad[4] else None
            rows = x.reshape(-1, x.shape[-1])
            dx, grads = tiled.backward(dy.reshape(-1, dy.shape[-1]), rows, mlp, dtypes, seeds, dx_dtype, needs, tile)
        flat = [grad for group in grads for grad in group]
        return None, None, None, None, None if dx is None else dx.view(shape), *flat


class LoraMlpDown(torch.autograd.Function):
    """The result, in place of what stood for it."""

    @staticmethod
    def forward(ctx, stand_in: Tensor, middle: Middle | Tiles) -> Tensor:  # type: ignore[no-untyped-def]
        with in_use(middle.projections):
            return middle.project(stand_in.shape[:-1])

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return dy, None


def apply(x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None], keep: bool, tile: int = 0) -> Tensor:
    """The MLP of x (..., in_features), differentiable where grad mode and inputs ask for it. Autocast must be off."""
    if mlp.adapter_index is None and have_one_a(mlp.inner, seeds[: len(mlp.inner)]):
        mlp = replace(mlp, one_a=True)
    tensors = [tensor for projection in mlp.projections for tensor in projection.tensors()]
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors)):
        first, how = (LoraMlpTiled, tile) if tile else (LoraMlpUpToDown, keep)
        return LoraMlpDown.apply(*first.apply(mlp, dtypes, seeds, how, x, *tensors))  # type: ignore[no-any-return]
    with in_use(mlp.projections):
        if tile:
            return Tiles(x.detach().reshape(-1, x.shape[-1]), mlp, dtypes, seeds, tile).project(x.shape[:-1])
        return library.forward(x.detach(), mlp, dtypes, seeds)


def stand_in(x: Tensor, mlp: Mlp, dtypes: Dtypes) -> Tensor:
    """What autograd takes for the result: zeros of its shape and dtype that take one number's storage."""
    return x.new_zeros((), dtype=dtypes.out).expand(*x.shape[:-1], mlp.down.weight.shape[0])
