"""The fused loss as one autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..mlp.autograd import graph_is_kept
from .call import Fixed, Kept, Outputs, Trained, compute, compute_backward, read_by_backward, reads_weight
from .problem import Needs


class FusedLoss(torch.autograd.Function):
    """Keeps the gradients of rows, and for a trained head the inputs and three numbers a token; logits as far as they
    lie where the weight's gradient will.
    """

    @staticmethod
    def forward(ctx, fixed: Fixed, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        trained, needs = Trained(*tensors), Needs(*ctx.needs_input_grad[1:])
        outputs, kept = compute(trained, fixed, needs)
        ctx.needs, ctx.fixed = needs, fixed[3:]
        ctx.stamp = None if fixed.stored is None else fixed.stored.stamp()
        # Not among the saved tensors, so that it is nobody else's when it is handed on as the weight's gradient.
        ctx.logits, kept = kept.logits, kept._replace(logits=None)
        ctx.save_for_backward(*kept, *read_by_backward(trained, kept), *fixed[:3])
        total = None if fixed.wants.total else outputs.total
        ctx.mark_non_differentiable(*(t for t in (total, outputs.entropy, outputs.correct) if t is not None))
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[no-untyped-def]
        ctx, d_nll: Tensor | None, d_lse: Tensor | None, d_total: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        given = [d for d in (d_nll, d_lse, d_total) if d is not None]
        if not given:
            return (None,) * 6
        saved = ctx.saved_tensors
        first, second = len(Kept._fields), len(Kept._fields) + len(Trained._fields)
        kept, trained, fixed = Kept(*saved[:first]), Trained(*saved[first:second]), Fixed(*saved[second:], *ctx.fixed)
        if fixed.stored is not None and reads_weight(kept, d_lse):
            fixed.stored.check_unchanged(ctx.stamp)
        spend = not graph_is_kept(given[0].device)
        kept = kept._replace(logits=ctx.logits)
        if spend:
            ctx.logits = None
        return None, *compute_backward(trained, fixed, ctx.needs, kept, d_nll, d_lse, d_total, spend)


def apply(trained: Trained, fixed: Fixed) -> Outputs:
    """The outputs, differentiable where grad mode and the inputs ask for it."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        outputs: Any = FusedLoss.apply(fixed, *trained)
        return Outputs(*outputs)
    return compute(trained, fixed, Needs())[0]
