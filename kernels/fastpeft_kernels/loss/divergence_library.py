"""Divergences and their gradients by PyTorch's operations, some rows at a time: no more than a few MB beside them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import steps
from .hard_labels import HardLabels
from .logit_map import PLAIN, LogitMap
from .rows import pieces


def divergence_library(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    temperature: float,
    beta: float,
    out: Tensor,
    kept: Tensor,
    student_map: LogitMap = PLAIN,
    teacher_map: LogitMap = PLAIN,
) -> None:
    """Fill `out` and `kept`, as `divergence_op.compute` gives them."""
    for rows in pieces(student):
        log_q, *of_student = _log_probs(_scaled(student[rows], student_map, temperature, kept.dtype))
        log_p, *of_teacher = _log_probs(_scaled(teacher[rows], teacher_map, temperature, kept.dtype))
        centre = torch.zeros_like(of_student[0])
        if beta == 0:
            value = _kl(log_p, log_q)
        elif beta == 1:
            value = centre = _kl(log_q, log_p)
        else:
            log_m = _mixture(log_q, log_p, beta)
            centre = _kl(log_q, log_m)
            value = beta * _kl(log_p, log_m) + (1 - beta) * centre
        kept[:, rows] = torch.stack([*of_student, *of_teacher, centre])
        out[rows] = value if counted is None else torch.where(counted[rows], value, 0.0)


def divergence_backward_library(
    dvalue: Tensor,
    student: Tensor,
    teacher: Tensor,
    kept: Tensor,
    temperature: float,
    beta: float,
    dstudent: Tensor,
    student_map: LogitMap = PLAIN,
    teacher_map: LogitMap = PLAIN,
    hard: HardLabels | None = None,
) -> None:
    """Fill `dstudent`, as `divergence_op.compute_backward` gives it; it may be student."""
    for rows in pieces(student):
        top_q, sum_q, top_p, sum_p, centre = (row[:, None] for row in kept[:, rows])
        z = _scaled(student[rows], student_map, temperature, kept.dtype)
        softcap = student_map.softcap
        slope = None if softcap is None else steps.cap_slope(z, softcap / temperature)
        log_q = z.sub_(top_q).sub_(sum_q)
        log_p = _scaled(teacher[rows], teacher_map, temperature, kept.dtype).sub_(top_p).sub_(sum_p)
        q = log_q.exp()
        if beta == 0:
            gradient = q.sub_(log_p.exp_())
        else:
            less = log_p if beta == 1 else _mixture(log_q, log_p, beta)
            weight = 1.0 if beta == 1 else 1.0 - beta
            gradient = torch.where(q == 0, 0.0, log_q.sub_(less).sub_(centre).mul_(q).mul_(weight))
        factor = (dvalue[rows] / temperature)[:, None]
        gradient = gradient.mul_(factor if slope is None else slope.mul_(factor))
        gradient = torch.where(factor == 0, 0.0, gradient)
        dstudent[rows] = gradient if hard is None else gradient.add_(_of_hard(student[rows], hard, rows, student_map))


def _of_hard(raw: Tensor, hard: HardLabels, rows: slice, student_map: LogitMap) -> Tensor:
    """The gradient of sum_t d_nll nll in raw, but for the map's scale; zero where d_nll is."""
    own = raw.to(hard.d_nll.dtype, copy=True)
    labels, top, inverse, others, d_nll = (x[rows] for x in hard[1:])
    named = student_map._asdict()
    steps.gradient_step(own, hard.first, labels, top, inverse, others, d_nll, None, None, **named)
    return own.masked_fill_((d_nll == 0)[:, None], 0.0)


def _scaled(raw: Tensor, logit_map: LogitMap, temperature: float, dtype: torch.dtype) -> Tensor:
    """Logits over temperature, in memory of their own."""
    return steps.to_logits(raw.to(dtype, copy=True), *logit_map).div_(temperature)


def _log_probs(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities in z's memory, a logit near the largest (rows,), logarithm of the sum relative to it)."""
    top = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
    log_sum = z.sub_(top).logsumexp(-1, keepdim=True)
    return z.sub_(log_sum), top[:, 0], log_sum[:, 0]


def _mixture(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p == 0, 0.0, (log_p - log_q).mul_(p)).sum(-1)
