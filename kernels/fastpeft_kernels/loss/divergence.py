"""Divergences between the distributions of a student and a teacher, for distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.validation import check_device, check_floating
from . import divergence_op
from .backends import check_backend
from .rows import as_rows
from .validation import check_beta, check_mask, check_reduction, check_temperature


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    beta: float = 0.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """How far the student's distribution is from the teacher's, summed over words, of each token.

    With q = softmax(student_logits / temperature), p = that of the teacher, and m = (1 - beta) q + beta p:

        beta = 0        KL(p || q), the forward direction: q is to cover p
        beta = 1        KL(q || p), the reverse direction: q is to stay within p
        between         beta KL(p || m) + (1 - beta) KL(q || m), the generalised Jensen-Shannon divergence

    as TRL's `generalized_jsd_loss` has it; nothing is multiplied with temperature^2. In nats, computed in fp32 (fp64 in
    fp64). Nothing of the logits' size is made but the student's gradient; both are read once forward (twice between 0
    and 1) and once backward. A word without probability adds nothing. Deterministic.

    Args:
        student_logits: (..., words), floating.
        teacher_logits: (..., words), floating; no gradient.
        temperature: > 0.
        beta: in [0, 1].
        mask: (...) bool, True for tokens that are counted; the others' divergence is zero, and so is their gradient.
            None for all.
        reduction: "mean", over the counted tokens, zero where there are none; "sum"; or "none".
        num_items: divides the sum in place of the number of counted tokens; a number or a 0-d tensor; only with "mean".
        backend: "torch"; "triton" (fp32, fp16 and bf16 on CUDA); or "auto": triton where it serves, else torch.

    Returns:
        0-d, or (...) for reduction "none"; fp32 (fp64 in fp64). Differentiable once, in student_logits.

    Raises:
        TypeError, ValueError: an argument is not as above.
        ImportError: backend "triton" without Triton.

    Source: On-Policy Distillation of Language Models, Agarwal et al. 2024, arXiv:2306.13649, equation 1.
    """
    _check(student_logits, teacher_logits, temperature, beta, mask)
    check_reduction(reduction, num_items)
    check_backend(backend, student_logits=student_logits, teacher_logits=teacher_logits)
    counted = None if mask is None else mask.reshape(-1)
    student, teacher = as_rows(student_logits), as_rows(teacher_logits)
    values = divergence_op.apply(student, teacher, counted, float(temperature), float(beta), backend)
    if reduction == "none":
        return values.view(student_logits.shape[:-1])
    if reduction == "mean" and num_items is None:
        num_items = values.numel() if counted is None else counted.sum()
        num_items = num_items.clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1)
    return values.sum() if num_items is None else values.sum() / num_items


def _check(student: Tensor, teacher: Tensor, temperature: float, beta: float, mask: Tensor | None) -> None:
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        check_floating(name, logits)
    if student.dim() < 1 or student.shape[-1] < 1:
        raise ValueError(f"student_logits: expected shape (..., words) with words >= 1, got {tuple(student.shape)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher_logits: expected the shape of student_logits, {tuple(student.shape)}, got {tuple(teacher.shape)}"
        )
    check_device("teacher_logits", teacher.device, student.device)
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError("teacher_logits: expected a tensor that requires no gradient, got one that does: detach it")
    check_temperature(temperature)
    check_beta(beta)
    if mask is not None:
        check_mask(mask, student)
