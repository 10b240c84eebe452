"""The MLP as one autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..lora.autograd import in_use, split_flags, tensors_read_again
from ..lora.projection import Dtypes
from . import library
from .structure import Mlp


class LoraMlp(torch.autograd.Function):
    """Keeps x, S of each projection and, if `keep`, gate and up; else those are computed again, but never down."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None], keep: bool, x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        needs = split_flags(ctx.needs_input_grad[5:], mlp.projections)
        ctx.group = (mlp, dtypes, seeds, needs)
        ctx.input = (x.shape, x.dtype)
        ctx.stamps = [projection.weight.stamp() for projection in mlp.projections]
        if dtypes.compute == dtypes.lora and x.dtype.itemsize >= dtypes.compute.itemsize:
            x = x.to(dtypes.compute)  # one cast serves every product, now and in backward
        x2 = x.reshape(-1, x.shape[-1])
        with in_use(mlp.projections):
            y, kept = library.forward(x2, mlp, dtypes, seeds)
        trains_a = any(flag for flags in needs[:-1] for flag in flags[1::3])
        inside = ctx.needs_input_grad[4] or any(flag for flags in needs[:-1] for flag in flags) or any(needs[-1][1::3])
        keep = keep or not inside
        ctx.save_for_backward(
            x if trains_a or not keep else None,
            kept.s if any(flag for flags in needs[:-1] for flag in flags[2::3]) else None,
            kept.pre if keep and inside else None,
            kept.s_down if any(needs[-1][2::3]) else None,
            *tensors_read_again(mlp.projections),
        )
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        mlp, dtypes, seeds, needs = ctx.group
        shape, dtype = ctx.input
        x, s, pre, s_down, *_ = ctx.saved_tensors
        x2 = None if x is None else x.reshape(-1, x.shape[-1])
        with in_use(mlp.projections):
            for projection, stamp in zip(mlp.projections, ctx.stamps, strict=True):
                projection.weight.check_unchanged(stamp)
            if pre is None and x2 is not None:
                pre, _ = library.inner(x2, mlp, dtypes, seeds)
            dx, grads = library.backward(
                dy.reshape(-1, dy.shape[-1]),
                x2,
                library.Kept(s, pre, s_down),
                mlp,
                dtypes,
                seeds,
                dtype if ctx.needs_input_grad[4] else None,
                needs,
            )
        flat = [grad for group in grads for grad in group]
        return None, None, None, None, None if dx is None else dx.view(shape).to(dtype), *flat


def apply(x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None], keep: bool) -> Tensor:
    """The MLP of x (..., in_features), differentiable where grad mode and inputs ask for it. Autocast must be off."""
    tensors = [tensor for projection in mlp.projections for tensor in projection.tensors()]
    if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors)):
        return LoraMlp.apply(mlp, dtypes, seeds, keep, x, *tensors)  # type: ignore[no-any-return]
    with in_use(mlp.projections):
        y, _ = library.forward(x.detach().reshape(-1, x.shape[-1]), mlp, dtypes, seeds)
    return y.view(*x.shape[:-1], y.shape[-1])
