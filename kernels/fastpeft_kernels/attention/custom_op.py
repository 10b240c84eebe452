"""Attention by our own implementations as torch.library ops, for torch.compile and selective checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.device import autocast_off
from ..common.remembered import forgetful
from .autograd import compute, compute_backward
from .gradients import Needs
from .layout import Flat, Numbers, flatten, unflatten
from .masks import Mask
from .scores import Scores

_TENSORS = 11


def apply(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores, backend: str, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """As `autograd.apply`."""
    flat = flatten(mask, scores)
    trained = (scores.relative, scores.bias, scores.sinks)
    return attention_op(q, k, v, *trained, *flat.tensors, *flat.numbers, backend, deterministic)


@torch.library.custom_op("fastpeft::attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    relative: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    keys: Tensor | None,
    dense: Tensor | None,
    seed: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of `autograd.compute`; the tensors and numbers are those of `layout.flatten`."""
    flat = Flat((start, stop, keys, dense, seed), Numbers(left, right, scale, softcap, dropout))
    with autocast_off(q.device), forgetful():
        return compute(q, k, v, *unflatten(flat, relative, bias, sinks), backend)


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _features = q.shape
    out = q.new_empty((batch, queries, heads, v.shape[3])).transpose(1, 2)
    return out, q.new_empty((batch, heads, queries), dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("fastpeft::attention_backward", mutates_args=())
def attention_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    relative: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    keys: Tensor | None,
    dense: Tensor | None,
    seed: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    needs: Sequence[bool],
    backend: str,
    deterministic: bool,
) -> list[Tensor]:
    """The gradients of q, k, v, relative, bias and sinks that `needs` asks for, in order."""
    flat = Flat((start, stop, keys, dense, seed), Numbers(left, right, scale, softcap, dropout))
    mask, scores = unflatten(flat, relative, bias, sinks)
    with autocast_off(q.device), forgetful():
        grads = compute_backward(dout, q, k, v, out, lse, mask, scores, Needs(*needs), backend, deterministic)
    of = (q, k, v, relative, bias, sinks)
    return [_like(grad, x) for grad, x in zip(grads, of, strict=True) if grad is not None and x is not None]


@attention_backward_op.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    relative: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    start: Tensor | None,
    stop: Tensor | None,
    keys: Tensor | None,
    dense: Tensor | None,
    seed: Tensor | None,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    needs: Sequence[bool],
    backend: str,
    deterministic: bool,
) -> list[Tensor]:
    of = (q, k, v, relative, bias, sinks)
    return [torch.empty_like(x) for x, flag in zip(of, needs, strict=True) if flag and x is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    tensors, ctx.others = inputs[:_TENSORS], inputs[_TENSORS:]
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])


def _backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *numbers, backend, deterministic = ctx.others
    if dout is None:
        return (None,) * (_TENSORS + len(ctx.others))
    needs = list(ctx.needs_input_grad[:6])
    found = iter(attention_backward_op(dout, *ctx.saved_tensors, *numbers, needs, backend, deterministic))
    return *(next(found) if flag else None for flag in needs), *[None] * (_TENSORS - 6 + len(ctx.others))


attention_op.register_autograd(_backward, setup_context=_setup)


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """With the strides that the fake gives."""
    wanted = torch.empty_like(x, device="meta").stride()
    if grad.stride() == wanted and grad.dtype == x.dtype:
        return grad
    return torch.empty_like(x).copy_(grad)
