"""A call of the fused distillation, forward and backward, as autograd and the custom op both make it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.device import product_dtype
from ..lora.autograd import in_use
from ..weights import DenseWeight, FrozenWeight
from .call import Trained
from .distillation_loops import Soft, distil, distil_again
from .kept_logits import KeptLogits
from .online import scaled_rows
from .problem import Needs, Problem
from .teachers import Given, TeacherHead


class Fixed(NamedTuple):
    """What is not trained: nine tensors, and more; as of `Problem`.

    Attributes:
        labels: int64, any where none are given.
        computed: see `Problem`.
        counted: (tokens,) bool where all are computed and not all count, or None.
        teacher_hidden, teacher_bias, teacher_s, teacher_b: of the teacher's head; teacher_hidden None without one.
        top_logits, top_words: (tokens, k), the teacher's in place of a head.
        stored: the student's weight; None where it is trained.
        teacher_stored: the teacher's weight, or None.
        scale, softcap, teacher_scale, teacher_softcap: see `Head`.
        dtype, low_dtype and the teacher's: of the products, wherever the device multiplies these fast.
        keep: see `call.Fixed`.
    """

    labels: Tensor
    computed: Tensor | None
    counted: Tensor | None
    teacher_hidden: Tensor | None
    teacher_bias: Tensor | None
    teacher_s: Tensor | None
    teacher_b: Tensor | None
    top_logits: Tensor | None
    top_words: Tensor | None
    stored: FrozenWeight | None
    teacher_stored: FrozenWeight | None
    scale: float
    softcap: float | None
    teacher_scale: float
    teacher_softcap: float | None
    dtype: torch.dtype
    low_dtype: torch.dtype
    teacher_dtype: torch.dtype
    teacher_low_dtype: torch.dtype
    soft: Soft
    keep: bool = False


TENSORS = 9
"""Of `Fixed`, in front."""


class Outputs(NamedTuple):
    """(tokens,) each, zero where one does not count; only `losses` is differentiable. nll may be None."""

    losses: Tensor
    divergence: Tensor
    nll: Tensor | None


class Kept(NamedTuple):
    """For backward: the gradients of rows, and what is known of each computed token for those of the head."""

    d_hidden: Tensor | None = None
    d_s: Tensor | None = None
    known: Tensor | None = None
    logits: Tensor | None = None


def compute(trained: Trained, fixed: Fixed, needs: Needs) -> tuple[Outputs, Kept]:
    """Forward, with what backward reads where `needs` asks for any gradient."""
    student, teacher = _student(trained, fixed), _teacher(fixed)
    with in_use((student, *_streamed(teacher))):
        # In fp16 the gradients that it holds would lose what the loss's scale is for.
        kept = fixed.keep and needs.weight and student.dtype != torch.float16
        memory = KeptLogits.room(student) if kept else None
        found = distil(student, teacher, fixed.counted, fixed.soft, needs, memory)
    losses = fixed.soft.divergence_weight * found.divergence
    if found.nll is not None:
        losses = losses + fixed.soft.cross_entropy_weight * found.nll
    outputs = Outputs(losses, found.divergence, found.nll)
    return outputs, Kept(found.sums.hidden, found.sums.s, found.known if needs.of_words else None, memory)


def read_by_backward(trained: Trained, tensors: Sequence[Any], kept: Kept) -> list[Tensor | None]:
    """The tensors of both, of `Fixed` in front; or None for each."""
    every = [*trained, *tensors]
    return every if kept.known is not None else [None] * len(every)


def compute_backward(
    trained: Trained, fixed: Fixed, needs: Needs, kept: Kept, d_losses: Tensor, spend: bool
) -> Trained:
    """The gradients that `needs` asks for, each in the dtype of what it belongs to.

    Args:
        trained, fixed: their tensors are read only where kept.known is given.
        spend: whether what is kept may be overwritten.
    """
    rows = (None if x is None else scaled_rows(x, d_losses, None, (), spend) for x in (kept.d_hidden, kept.d_s))
    hidden, s = rows
    if kept.known is None:
        return Trained(hidden, None, None, s, None)
    student, teacher = _student(trained, fixed), _teacher(fixed)
    with in_use((student, *_streamed(teacher))):
        known, memory = kept.known, kept.logits
        sums = distil_again(student, teacher, fixed.counted, fixed.soft, needs, known, d_losses, memory, spend)
    return Trained(hidden, sums.weight, sums.bias, s, sums.b)


def _student(trained: Trained, fixed: Fixed) -> Problem:
    hidden, weight, bias, s, b = (None if t is None else t.detach() for t in trained)
    frozen = fixed.stored if weight is None else DenseWeight(weight)
    return _problem(
        hidden, frozen, bias, s, b, fixed, fixed.scale, fixed.softcap, fixed.dtype, fixed.low_dtype
    )  # fmt: skip


def _teacher(fixed: Fixed) -> Given | TeacherHead:
    if fixed.top_logits is not None and fixed.top_words is not None:
        return Given(fixed.top_logits, fixed.top_words, fixed.computed)
    return TeacherHead(
        _problem(
            fixed.teacher_hidden, fixed.teacher_stored, fixed.teacher_bias, fixed.teacher_s, fixed.teacher_b, fixed,
            fixed.teacher_scale, fixed.teacher_softcap, fixed.teacher_dtype, fixed.teacher_low_dtype,
        )
    )  # fmt: skip


def _streamed(teacher: Given | TeacherHead) -> tuple[Problem, ...]:
    return (teacher.problem,) if isinstance(teacher, TeacherHead) else ()


def _problem(
    hidden: Tensor | None,
    weight: FrozenWeight | None,
    bias: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    fixed: Fixed,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
    low_dtype: torch.dtype,
) -> Problem:
    assert hidden is not None and weight is not None
    dtype, low_dtype = (product_dtype(x, hidden.device) for x in (dtype, low_dtype))
    bias = None if bias is None else bias.contiguous()
    return Problem(
        hidden, weight, fixed.labels, fixed.computed, bias, s, b, None, scale, softcap, dtype, low_dtype
    )  # fmt: skip
