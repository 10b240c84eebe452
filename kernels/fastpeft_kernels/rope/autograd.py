"""Rotary embeddings by our kernel for autograd: backward turns the other way, and reads cos and sin only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .rotation import Rotation


class Rotary(torch.autograd.Function):
    """(q, k) turned. Nothing of their size is kept."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, rotation: Rotation
    ) -> tuple[Tensor, Any]:
        ctx.set_materialize_grads(False)
        ctx.rotation = rotation
        ctx.save_for_backward(cos, sin)
        outs = compute(q, k, cos, sin, rotation)
        # of an input without gradient the result has none either, or attention would compute one that nobody reads
        unread = [out for out, need in zip(outs, ctx.needs_input_grad, strict=False) if out is not None and not need]
        ctx.mark_non_differentiable(*unread)
        ctx.like = [out if out is None else out.stride() for out in outs]
        ctx.dtype = q.dtype
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor | None, dk: Tensor | None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        cos, sin = ctx.saved_tensors
        given = [d if need else None for d, need in zip((dq, dk), ctx.needs_input_grad[:2], strict=True)]
        outs = [
            None if d is None else torch.empty_strided(d.shape, stride, dtype=ctx.dtype, device=d.device)
            for d, stride in zip(given, ctx.like, strict=True)
        ]
        _fill(given[0], given[1], cos, sin, ctx.rotation, (outs[0], outs[1]), transposed=True)
        return *outs, None, None, None


def apply(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, rotation: Rotation) -> tuple[Tensor, Any]:
    """(q, k) turned, differentiable where grad mode and the inputs ask for it."""
    if torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad)):
        return Rotary.apply(q, k, cos, sin, rotation)  # type: ignore[no-any-return]
    return compute(q, k, cos, sin, rotation)


def compute(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, rotation: Rotation) -> tuple[Tensor, Any]:
    """The results, dense, their dimensions in the order in which q's and k's lie in memory, but for the last."""
    rows = _rows(q), None if k is None else _rows(k)
    outs = (
        torch.empty_like(rows[0], dtype=rotation.out),
        None if rows[1] is None else torch.empty_like(rows[1], dtype=rotation.out),
    )
    _fill(*rows, cos, sin, rotation, outs)
    return outs


def _fill(
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    rotation: Rotation,
    outs: tuple[Tensor | None, Tensor | None],
    transposed: bool = False,
) -> None:
    """Fill `outs`; what is None is left out."""
    from .forward import rotary_triton

    q, k = (None if x is None or x.numel() == 0 else _rows(x) for x in (q, k))
    if q is not None or k is not None:
        rotary_triton(q, k, _rows(cos), _rows(sin), rotation, outs, transposed)


def _rows(x: Tensor) -> Tensor:
    """With a contiguous last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()
