"""Attention by our own implementations as one autograd function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.device import autocast_off
from ..common.shapes import imitated
from . import library_cpu
from .blockwise import attention_backward_blockwise, attention_blockwise
from .choosing import own_backend
from .gradients import Gradients, Needs
from .layout import Flat, flatten, unflatten
from .library import sdpa_refusal
from .masks import Mask
from .scores import Scores
from .shapes import added_shapes, attention_shapes, gradient_shapes


class Attention(torch.autograd.Function):
    """Keeps q, k, v, the result and the logarithm of each row's sum; no scores."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, q: Tensor, k: Tensor, v: Tensor, flat: Flat, backend: str, deterministic: bool, *trained: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        mask, scores = unflatten(flat, *trained)
        added = beside = None
        if mask.dense is not None and imitated(q.device) and sdpa_refusal(q, k, v, mask, scores) is None:
            added, beside = added_shapes(q, mask.dense)
        out, lse = compute(q, k, v, mask, scores, backend)
        del beside
        if added is not None:
            flat = flatten(replace(mask, dense=added), scores)
        ctx.numbers, ctx.backend, ctx.deterministic = flat.numbers, backend, deterministic
        ctx.save_for_backward(q, k, v, out, lse, *trained, *flat.tensors)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        if dout is None:
            return (None,) * 9
        q, k, v, out, lse, relative, bias, sinks, *tensors = ctx.saved_tensors
        mask, scores = unflatten(Flat(tensors, ctx.numbers), relative, bias, sinks)
        wants = ctx.needs_input_grad
        needs = Needs(*wants[:3], *wants[6:])
        with autocast_off(q.device):
            grads = compute_backward(dout, q, k, v, out, lse, mask, scores, needs, ctx.backend, ctx.deterministic)
        return grads.q, grads.k, grads.v, None, None, None, grads.relative, grads.bias, grads.sinks


def apply(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores, backend: str, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """(out, lse); out is differentiable where grad mode and the inputs ask for it. Autocast must be off.

    Args:
        backend: "triton", "blockwise", or "auto" for one of these, or for PyTorch's kernel of a CPU.
    """
    trained = (scores.relative, scores.bias, scores.sinks)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, *trained)):
        found = Attention.apply(q, k, v, flatten(mask, scores), backend, deterministic, *trained)
        return found  # type: ignore[no-any-return]
    return compute(q, k, v, mask, scores, backend)


def compute(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) without a gradient."""
    if imitated(q.device):
        return attention_shapes(q, v, library=sdpa_refusal(q, k, v, mask, scores) is None)
    if backend == "auto":
        backend = own_backend(q, k, v, mask, scores)
    if backend == "blockwise":
        return attention_blockwise(q, k, v, mask, scores)
    if backend == "cpu":
        return library_cpu.attention_cpu(q, k, v, scores)
    from .forward import attention_triton

    return attention_triton(q, k, v, mask, scores)


def compute_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    scores: Scores,
    needs: Needs,
    backend: str,
    deterministic: bool,
) -> Gradients:
    """The gradients that are wanted, by the implementation that `compute` took."""
    if imitated(q.device):
        return gradient_shapes(q, k, v, scores, needs)
    if backend == "auto":
        backend = own_backend(q, k, v, mask, scores)
    if backend == "blockwise":
        return attention_backward_blockwise(dout, q, k, v, out, lse, mask, scores, needs)
    if backend == "cpu":
        return library_cpu.attention_backward_cpu(dout, q, k, v, out, lse, scores, needs)
    from .backward import attention_backward_triton

    return attention_backward_triton(dout, q, k, v, out, lse, mask, scores, needs, deterministic)
