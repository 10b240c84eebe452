"""Divergences, differentiable in the student: as an autograd function, and as a torch.library op for torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.tracing import as_op
from .backends import logits_backend
from .divergence_library import divergence_backward_library, divergence_library
from .hard_labels import HardLabels
from .logit_map import PLAIN, LogitMap

KEPT = 5


def compute(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    temperature: float,
    beta: float,
    backend: str,
    student_map: LogitMap = PLAIN,
    teacher_map: LogitMap = PLAIN,
) -> tuple[Tensor, Tensor]:
    """(values, kept) of logits (tokens, words), columns contiguous.

    Args:
        counted: (tokens,) bool, or None for all.
        temperature, beta: see `kl_divergence`.
        student_map, teacher_map: what is still to be done to the logits.

    Returns:
        values: (tokens,), fp32 at least, zero where a token is not counted.
        kept: (5, tokens), same dtype: for student and teacher the reference point of the exponentials and the logarithm
            of their sum, and the student's mean of what its probabilities are multiplied with in the gradient. Only
            for tokens that are counted.
    """
    wide = _wide(student, teacher)
    out = torch.empty(student.shape[0], dtype=wide, device=student.device)
    kept = torch.empty((KEPT, student.shape[0]), dtype=wide, device=student.device)
    arguments = (student, teacher, counted, temperature, beta, out, kept)
    if logits_backend(backend, student, teacher) == "triton":
        from .divergence_triton import divergence_triton

        divergence_triton(*arguments, student_map=student_map, teacher_map=teacher_map)
    else:
        divergence_library(*arguments, student_map, teacher_map)
    return out, kept


def compute_backward(
    dvalues: Tensor,
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    kept: Tensor,
    temperature: float,
    beta: float,
    backend: str,
    student_map: LogitMap = PLAIN,
    teacher_map: LogitMap = PLAIN,
    hard: HardLabels | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient in student, in its dtype, but for the scale of `student_map`; a chunk of words has one of its own.

    Args:
        dvalues: (tokens,), of the dtype of the values; where it is zero nothing is read.
        hard: the loss of labels that is added.
        out: for the gradient, may be student; None for memory of its own.
    """
    dvalues = dvalues.contiguous() if counted is None else torch.where(counted, dvalues, 0.0)
    if out is None:
        out = torch.empty(tuple(student.shape), dtype=student.dtype, device=student.device)
    arguments = (dvalues, student, teacher, kept, temperature, beta, out)
    if logits_backend(backend, student, teacher) == "triton":
        from .divergence_triton import divergence_backward_triton

        divergence_backward_triton(*arguments, student_map=student_map, teacher_map=teacher_map, hard=hard)
    else:
        divergence_backward_library(*arguments, student_map, teacher_map, hard)
    return out


@torch.library.custom_op("fastpeft::divergence", mutates_args=())
def divergence_op(
    student: Tensor, teacher: Tensor, counted: Tensor | None, temperature: float, beta: float, backend: str
) -> tuple[Tensor, Tensor]:
    """`compute`."""
    return compute(student, teacher, counted, temperature, beta, backend)


@divergence_op.register_fake
def _(student: Tensor, teacher: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide, tokens = _wide(student, teacher), student.shape[0]
    return student.new_empty(tokens, dtype=wide), student.new_empty((KEPT, tokens), dtype=wide)


@torch.library.custom_op("fastpeft::divergence_backward", mutates_args=())
def divergence_backward_op(
    dvalues: Tensor,
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    kept: Tensor,
    temperature: float,
    beta: float,
    backend: str,
) -> Tensor:
    """`compute_backward`."""
    return compute_backward(dvalues, student, teacher, counted, kept, temperature, beta, backend)


@divergence_backward_op.register_fake
def _(dvalues: Tensor, student: Tensor, *_: Any) -> Tensor:
    return student.new_empty(student.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    student, teacher, counted, *ctx.others = inputs
    ctx.save_for_backward(student, teacher, counted, output[1])


def _backward(ctx: Any, dvalues: Tensor | None, _: Any) -> tuple[Any, ...]:
    dstudent = None
    if dvalues is not None and ctx.needs_input_grad[0]:
        dstudent = divergence_backward_op(dvalues, *ctx.saved_tensors, *ctx.others)
    return dstudent, None, None, None, None, None


divergence_op.register_autograd(_backward, setup_context=_setup)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        counted: Tensor | None,
        temperature: float,
        beta: float,
        backend: str,
    ) -> Tensor:
        values, kept = compute(student, teacher, counted, temperature, beta, backend)
        ctx.others = (temperature, beta, backend)
        ctx.save_for_backward(student, teacher, counted, kept)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dvalues: Tensor) -> tuple[Any, ...]:
        return compute_backward(dvalues, *ctx.saved_tensors, *ctx.others), None, None, None, None, None


def apply(
    student: Tensor, teacher: Tensor, counted: Tensor | None, temperature: float, beta: float, backend: str
) -> Tensor:
    """(tokens,) the values of `compute`, differentiable in student."""
    arguments = (student, teacher, counted, temperature, beta, backend)
    return divergence_op(*arguments)[0] if as_op() else _Divergence.apply(*arguments)


def _wide(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
