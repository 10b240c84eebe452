"""The fused loss as torch.library ops, for torch.compile and selective checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.traced_json import parsed, to_json
from ..weights import FrozenWeight, unflatten_weight
from .call import Fixed, Kept, Outputs, Trained, again, compute, compute_backward, online, read_by_backward
from .problem import Needs, Wants, kept_dtype

_OUTPUTS = len(Outputs._fields)
_KEPT = len(Kept._fields)
_TRAINED = len(Trained._fields)


def apply(trained: Trained, fixed: Fixed) -> Outputs:
    """As `autograd.apply`, of all tokens."""
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in trained]
    stored, layout = flat(fixed.stored)
    found = linear_loss_op(
        *trained,
        fixed.labels,
        fixed.class_weight,
        stored,
        layout,
        fixed.scale,
        fixed.softcap,
        fixed.dtype,
        fixed.low_dtype,
        list(fixed.wants),
        needs,
    )
    nll, lse, total, entropy, correct = found[:_OUTPUTS]
    wants = fixed.wants
    if wants.sums and not wants.total:
        total = total.detach()
    return Outputs(
        nll, lse, total if wants.sums else None, entropy if wants.entropy else None, correct if wants.correct else None
    )


@torch.library.custom_op("fastpeft::linear_loss", mutates_args=())
def linear_loss_op(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    stored: Sequence[Tensor],
    layout: str,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    low_dtype: torch.dtype,
    wants: Sequence[bool],
    needs: Sequence[bool],
) -> list[Tensor]:
    """`Outputs`, then `Kept` of `call.compute`; without a value where there is none.

    Args:
        stored, layout: of `flat`.
        wants, needs: `Wants` and `Needs`.
    """
    fixed = Fixed(labels, None, class_weight, unflat(stored, layout), scale, softcap, dtype, low_dtype, Wants(*wants))
    outputs, kept = compute(Trained(hidden, weight, bias, s, b), fixed, Needs(*needs))
    return [hidden.new_empty(0) if t is None else t for t in (*outputs, *kept)]


@linear_loss_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    stored: Sequence[Tensor],
    layout: str,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    low_dtype: torch.dtype,
    wants: Sequence[bool],
    needs: Sequence[bool],
) -> list[Tensor]:
    wide, wanted, needed = torch.promote_types(dtype, torch.float32), Wants(*wants), Needs(*needs)
    made = online(needed, wanted)
    again_needed = again(needed, made)

    def numbers(there: bool = True, dtype: torch.dtype = wide) -> Tensor:
        return hidden.new_empty(labels.shape[0], dtype=dtype) if there else hidden.new_empty(0)

    def rows(of: Tensor | None) -> Tensor:
        return hidden.new_empty(0) if of is None else of.new_empty(of.shape, dtype=kept_dtype(of.dtype))

    return [
        numbers(),
        numbers(),
        numbers(wanted.sums),
        numbers(wanted.entropy),
        numbers(wanted.correct, torch.bool),
        rows(hidden if made and needed.hidden else None),
        rows(s if made and needed.s else None),
        numbers(made),
        *(numbers(again_needed) for _ in range(3)),
        hidden.new_empty(0),
    ]


@torch.library.custom_op("fastpeft::linear_loss_backward", mutates_args=())
def linear_loss_backward_op(
    gradients: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    stored: Sequence[Tensor],
    layout: str,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    low_dtype: torch.dtype,
    wants: Sequence[bool],
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients of hidden, weight, bias, s and b that `needs` asks for, in order.

    Args:
        gradients: those of nll, lse and total, not all None.
        kept: `Kept`.
    """
    fixed = Fixed(labels, None, class_weight, unflat(stored, layout), scale, softcap, dtype, low_dtype, Wants(*wants))
    trained = Trained(hidden, weight, bias, s, b)
    d_nll, d_lse, d_total = gradients
    found = compute_backward(trained, fixed, Needs(*needs), Kept(*kept), d_nll, d_lse, d_total, spend=False)
    return [grad for grad in found if grad is not None]


@linear_loss_backward_op.register_fake
def _(
    gradients: Sequence[Tensor | None],
    kept: Sequence[Tensor | None],
    hidden: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    needs, found = _[-1], Kept(*kept)
    made = found.slope is not None
    of = (found.d_hidden if made else hidden, weight, bias, found.d_s if made else s, b)
    return [t.new_empty(t.shape) for t, flag in zip(of, needs, strict=True) if flag and t is not None]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *trained, labels, class_weight, stored, layout, scale, softcap, dtype, low_dtype, wants, needs = inputs
    ctx.numbers = (layout, scale, softcap, dtype, low_dtype, wants, needs)
    needed = Needs(*needs)
    made = online(needed, Wants(*wants))
    there = [made and needed.hidden, made and needed.s, made, *[again(needed, made)] * 3, False]
    kept = Kept(*(t if flag else None for t, flag in zip(output[_OUTPUTS:], there, strict=True)))
    ctx.stored = len(stored)
    ctx.save_for_backward(*kept, *read_by_backward(Trained(*trained), kept), labels, class_weight, *stored)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    after = _KEPT + _TRAINED + 2
    kept, tensors, stored = saved[:_KEPT], saved[_KEPT:after], saved[after:]
    needs, rest = ctx.numbers[-1], (None, None, [None] * ctx.stored, *[None] * 7)
    if all(gradient is None for gradient in gradients[:3]):
        return (*[None] * _TRAINED, *rest)
    found = iter(linear_loss_backward_op(gradients[:3], kept, *tensors, stored, *ctx.numbers))
    return (*(next(found) if flag else None for flag in needs), *rest)


linear_loss_op.register_autograd(_backward, setup_context=_setup)


def flat(weight: FrozenWeight | None) -> tuple[list[Tensor], str]:
    """Its tensors, and what it is in JSON; neither where there is none."""
    if weight is None:
        return [], ""
    tensors, meta = weight.flatten()
    return list(tensors), to_json({"kind": weight.kind, "meta": meta})


def unflat(tensors: Sequence[Tensor], layout: str) -> FrozenWeight | None:
    if not layout:
        return None
    described = parsed(layout)
    return unflatten_weight(described["kind"], tuple(tensors), described["meta"])
