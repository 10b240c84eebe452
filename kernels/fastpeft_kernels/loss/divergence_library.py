"""Divergences and their gradients by PyTorch's operations, some rows at a time: no more than a few MB beside them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rows import pieces


def divergence_library(
    student: Tensor, teacher: Tensor, counted: Tensor | None, temperature: float, beta: float, out: Tensor, kept: Tensor
) -> None:
    """Fill `out` and `kept`, as `divergence_op.compute` gives them."""
    for rows in pieces(student):
        log_q, *of_student = _log_probs(student[rows], temperature, kept.dtype)
        log_p, *of_teacher = _log_probs(teacher[rows], temperature, kept.dtype)
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
    dvalue: Tensor, student: Tensor, teacher: Tensor, kept: Tensor, temperature: float, beta: float, dstudent: Tensor
) -> None:
    """Fill `dstudent`; a row whose `dvalue` is zero gets zeros."""
    for rows in pieces(student):
        top_q, sum_q, top_p, sum_p, centre = (row[:, None] for row in kept[:, rows])
        log_q = _log_probs(student[rows], temperature, kept.dtype, top_q, sum_q)[0]
        log_p = _log_probs(teacher[rows], temperature, kept.dtype, top_p, sum_p)[0]
        q = log_q.exp()
        if beta == 0:
            gradient = q.sub_(log_p.exp_())
        else:
            less = log_p if beta == 1 else _mixture(log_q, log_p, beta)
            weight = 1.0 if beta == 1 else 1.0 - beta
            gradient = torch.where(q == 0, 0.0, log_q.sub_(less).sub_(centre).mul_(q).mul_(weight))
        factor = (dvalue[rows] / temperature)[:, None]
        dstudent[rows] = torch.where(factor == 0, 0.0, gradient.mul_(factor)).to(dstudent.dtype)


def _log_probs(
    logits: Tensor, temperature: float, dtype: torch.dtype, top: Tensor | None = None, log_sum: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, a logit near the largest (rows,), logarithm of the sum relative to it (rows,))."""
    z = logits.to(dtype, copy=True).div_(temperature)
    if top is None or log_sum is None:
        top = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
        log_sum = z.sub_(top).logsumexp(-1, keepdim=True)
    else:
        z.sub_(top)
    return z.sub_(log_sum), top[:, 0], log_sum[:, 0]


def _mixture(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return torch.where(p == 0, 0.0, (log_p - log_q).mul_(p)).sum(-1)
