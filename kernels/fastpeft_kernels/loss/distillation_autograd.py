"""The fused distillation as one autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..mlp.autograd import graph_is_kept
from .call import Trained
from .distillation_call import TENSORS, Fixed, Kept, Outputs, compute, compute_backward, read_by_backward
from .problem import Needs


class FusedDistillation(torch.autograd.Function):
    """Keeps the gradients of rows, and for a trained head the inputs and five or eight numbers a token; no logits."""

    @staticmethod
    def forward(ctx, fixed: Fixed, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        trained, needs = Trained(*tensors), Needs(*ctx.needs_input_grad[1:])
        outputs, kept = compute(trained, fixed, needs)
        ctx.needs, ctx.fixed = needs, fixed[TENSORS:]
        ctx.stamps = [None if weight is None else weight.stamp() for weight in _weights(fixed)]
        ctx.logits, kept = kept.logits, kept._replace(logits=None)  # as `autograd.FusedLoss`
        ctx.save_for_backward(*kept, *read_by_backward(trained, fixed[:TENSORS], kept))
        ctx.mark_non_differentiable(*(t for t in outputs[1:] if t is not None))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_losses: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        first, second = len(Kept._fields), len(Kept._fields) + len(Trained._fields)
        kept, trained, fixed = Kept(*saved[:first]), Trained(*saved[first:second]), Fixed(*saved[second:], *ctx.fixed)
        if kept.known is not None:
            for weight, stamp in zip(_weights(fixed), ctx.stamps, strict=True):
                if weight is not None:
                    weight.check_unchanged(stamp)
        spend = not graph_is_kept(d_losses.device)
        kept = kept._replace(logits=ctx.logits)
        if spend:
            ctx.logits = None
        return None, *compute_backward(trained, fixed, ctx.needs, kept, d_losses, spend)


def apply(trained: Trained, fixed: Fixed) -> Outputs:
    """The outputs, differentiable where grad mode and the inputs ask for it."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        outputs: Any = FusedDistillation.apply(fixed, *trained)
        return Outputs(*outputs)
    return compute(trained, fixed, Needs())[0]


def _weights(fixed: Fixed) -> tuple[Any, Any]:
    return fixed.stored, fixed.teacher_stored
