"""`statistics`, differentiable: as an autograd function, and as a torch.library op for torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.tracing import as_op
from .statistics import statistics, statistics_backward


@torch.library.custom_op("fastpeft::logit_statistics", mutates_args=())
def statistics_op(
    logits: Tensor, labels: Tensor, ignore_index: int, class_weight: Tensor | None, total: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Statistics`, an empty tensor for a total that is not wanted."""
    found = statistics(logits, labels, ignore_index, class_weight, total, backend)
    sums = found.lse.new_empty(0) if found.total is None else found.total
    return found.nll, found.lse, sums, found.top, found.inverse, found.others


@statistics_op.register_fake
def _(
    logits: Tensor, labels: Tensor, ignore_index: int, class_weight: Tensor | None, total: bool, backend: str
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    sizes = [logits.shape[0]] * 2 + [logits.shape[0] if total else 0] + [logits.shape[0]] * 3
    return tuple(logits.new_empty(size, dtype=wide) for size in sizes)


@torch.library.custom_op("fastpeft::logit_statistics_backward", mutates_args=())
def statistics_backward_op(
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_total: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    class_weight: Tensor | None,
    top: Tensor,
    inverse: Tensor,
    others: Tensor,
    backend: str,
) -> Tensor:
    """`statistics_backward`."""
    return statistics_backward(
        d_nll, d_lse, d_total, logits, labels, ignore_index, class_weight, top, inverse, others, backend
    )


@statistics_backward_op.register_fake
def _(d_nll: Any, d_lse: Any, d_total: Any, logits: Tensor, *others: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    logits, labels, ctx.ignore_index, class_weight, ctx.total, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, class_weight, *output[3:])


def _backward(ctx: Any, d_nll: Tensor | None, d_lse: Tensor | None, d_total: Tensor | None, *_: Any) -> tuple[Any, ...]:
    logits, labels, class_weight, *kept = ctx.saved_tensors
    d_total = d_total if ctx.total else None
    dlogits = None
    if ctx.needs_input_grad[0] and not (d_nll is None and d_lse is None and d_total is None):
        given = (d_nll, d_lse, d_total, logits, labels, ctx.ignore_index, class_weight)
        dlogits = statistics_backward_op(*given, *kept, ctx.backend)
    return dlogits, None, None, None, None, None


statistics_op.register_autograd(_backward, setup_context=_setup)


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int,
        class_weight: Tensor | None,
        total: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        nll, lse, sums, *kept = statistics(logits, labels, ignore_index, class_weight, total, backend)
        ctx.set_materialize_grads(False)
        ctx.ignore_index, ctx.backend = ignore_index, backend
        ctx.save_for_backward(logits, labels, class_weight, *kept)
        return nll, lse, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nll: Tensor | None, d_lse: Tensor | None, d_total: Tensor | None) -> tuple[Any, ...]:
        dlogits = None
        if not (d_nll is None and d_lse is None and d_total is None):
            logits, labels, class_weight, top, inverse, others = ctx.saved_tensors
            given = (d_nll, d_lse, d_total, logits, labels, ctx.ignore_index, class_weight)
            dlogits = statistics_backward(*given, top, inverse, others, ctx.backend)
        return dlogits, None, None, None, None, None


def apply(
    logits: Tensor, labels: Tensor, ignore_index: int, class_weight: Tensor | None, total: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(nll, lse, total) of `Statistics`, differentiable in logits."""
    arguments = (logits, labels, ignore_index, class_weight, total, backend)
    if not as_op():
        return _Statistics.apply(*arguments)
    nll, lse, sums, *_ = statistics_op(*arguments)
    return nll, lse, sums if total else None
