"""Divergences between the distributions of a student and a teacher, in plain PyTorch: the definition and the oracle."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def divergence_reference(student: Tensor, teacher: Tensor, temperature: float = 1.0, beta: float = 0.0) -> Tensor:
    """Of each token, (...), of logits (..., words), computed in fp32 at least, differentiable; see `kl_divergence`."""
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    log_q, log_p = (F.log_softmax(logits.to(wide) / temperature, -1) for logits in (student, teacher))
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), where a word without probability has no part in it."""
    return torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)
