"""The fused distillation as torch.library ops, for torch.compile and selective checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.traced_json import parsed, to_json
from .call import Trained
from .custom_op import flat, unflat
from .distillation_call import TENSORS, Fixed, Kept, Outputs, compute, compute_backward, read_by_backward
from .distillation_loops import Soft, known_rows, wide_dtype
from .problem import Needs, kept_dtype

_TRAINED = len(Trained._fields)
_KEPT = len(Kept._fields)


def apply(trained: Trained, fixed: Fixed) -> Outputs:
    """As `distillation_autograd.apply`, of all tokens."""
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in trained]
    (stored, layout), (teacher_stored, teacher_layout) = flat(fixed.stored), flat(fixed.teacher_stored)
    numbers = [str(x) if isinstance(x, torch.dtype) else x for x in (*fixed[TENSORS + 2 : -2], *fixed.soft)]
    described = (layout, teacher_layout, to_json(numbers))
    losses, divergence, nll, *_ = linear_distillation_op(
        *trained, list(fixed[:TENSORS]), stored, teacher_stored, *described, needs
    )
    return Outputs(losses, divergence, nll if fixed.soft.cross_entropy_weight else None)


@torch.library.custom_op("fastpeft::linear_distillation", mutates_args=())
def linear_distillation_op(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    tensors: Sequence[Tensor | None],
    stored: Sequence[Tensor],
    teacher_stored: Sequence[Tensor],
    layout: str,
    teacher_layout: str,
    numbers: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """`Outputs`, then `Kept` of `distillation_call.compute`; without a value where there is none.

    Args:
        tensors: those of `Fixed`.
        stored, layout, teacher_stored, teacher_layout: of `flat`.
        numbers: what else is in `Fixed`, in JSON.
        needs: `Needs`.
    """
    fixed = _fixed(tensors, stored, teacher_stored, layout, teacher_layout, numbers)
    outputs, kept = compute(Trained(hidden, weight, bias, s, b), fixed, Needs(*needs))
    return [hidden.new_empty(0) if t is None else t for t in (*outputs, *kept)]


@linear_distillation_op.register_fake
def _(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, s: Tensor | None, b: Tensor | None, *others: Any
) -> list[Tensor]:
    fixed, needed, tokens = _fixed(*others[:-1]), Needs(*others[-1]), hidden.shape[0]
    wide, none = wide_dtype(fixed.dtype, fixed.teacher_dtype), hidden.new_empty(0)
    return [
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(tokens, dtype=wide),
        hidden.new_empty(tokens, dtype=wide) if fixed.soft.cross_entropy_weight else none,
        hidden.new_empty(hidden.shape, dtype=kept_dtype(hidden.dtype)) if needed.hidden else none,
        s.new_empty(s.shape, dtype=kept_dtype(s.dtype)) if needed.s and s is not None else none,
        hidden.new_empty((known_rows(fixed.soft), tokens), dtype=wide) if needed.of_words else none,
        none,
    ]


@torch.library.custom_op("fastpeft::linear_distillation_backward", mutates_args=())
def linear_distillation_backward_op(
    d_losses: Tensor,
    kept: Sequence[Tensor | None],
    trained: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    stored: Sequence[Tensor],
    teacher_stored: Sequence[Tensor],
    layout: str,
    teacher_layout: str,
    numbers: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of hidden, weight, bias, s and b that `needs` asks for, in order. kept: `Kept`."""
    fixed = _fixed(tensors, stored, teacher_stored, layout, teacher_layout, numbers)
    found = compute_backward(Trained(*trained), fixed, Needs(*needs), Kept(*kept), d_losses, spend=False)
    return [grad for grad in found if grad is not None]


@linear_distillation_backward_op.register_fake
def _(d_losses: Tensor, kept: Sequence[Tensor | None], trained: Sequence[Tensor | None], *others: Any) -> list[Tensor]:
    found, (_, weight, bias, _, b) = Kept(*kept), trained
    of = (found.d_hidden, weight, bias, found.d_s, b)
    return [t.new_empty(t.shape) for t, flag in zip(of, others[-1], strict=True) if flag and t is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    trained, (tensors, stored, teacher_stored, *ctx.described, ctx.needs) = (
        Trained(*inputs[:_TRAINED]),
        inputs[_TRAINED:],
    )
    needs = Needs(*ctx.needs)
    there = (needs.hidden, needs.s, needs.of_words, False)
    kept = Kept(*(t if flag else None for t, flag in zip(output[-_KEPT:], there, strict=True)))
    ctx.counts = (len(stored), len(teacher_stored))
    ctx.save_for_backward(*kept, *read_by_backward(trained, tensors, kept), *stored, *teacher_stored)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    rest = (None, *([None] * count for count in ctx.counts), None, None, None, None)
    if gradients[0] is None:
        return (*[None] * _TRAINED, *rest)
    sizes = (_KEPT, _TRAINED, TENSORS, *ctx.counts)
    parts, saved = [], list(ctx.saved_tensors)
    for size in sizes:
        parts.append(saved[:size])
        saved = saved[size:]
    found = iter(linear_distillation_backward_op(gradients[0], *parts, *ctx.described, ctx.needs))
    return (*(next(found) if flag else None for flag in ctx.needs), *rest)


linear_distillation_op.register_autograd(_backward, setup_context=_setup)


def _fixed(
    tensors: Sequence[Tensor | None],
    stored: Sequence[Tensor],
    teacher_stored: Sequence[Tensor],
    layout: str,
    teacher_layout: str,
    numbers: str,
) -> Fixed:
    others = [getattr(torch, x.removeprefix("torch.")) if isinstance(x, str) else x for x in parsed(numbers)]
    weights = (unflat(stored, layout), unflat(teacher_stored, teacher_layout))
    return Fixed(*tensors, *weights, *others[:-4], Soft(*others[-4:]))  # type: ignore[arg-type, call-arg]
