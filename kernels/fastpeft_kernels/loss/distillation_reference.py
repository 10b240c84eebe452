"""The loss of a student under its teacher in plain PyTorch, in any dtype: the oracle, which makes all logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence_reference import divergence_reference
from .reference import token_losses_reference


def distillation_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    divergence_weight: float = 1.0,
    cross_entropy_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, divergence, nll) of each token (tokens,), of logits (tokens, words), computed in fp32 at least.

    Args:
        labels: (tokens,) int64; where -100, all three are zero.
    """
    divergence = divergence_reference(student_logits, teacher_logits, temperature, beta)
    divergence = torch.where(labels != -100, divergence, 0.0)
    nll = token_losses_reference(student_logits, labels)
    return divergence_weight * divergence + cross_entropy_weight * nll, divergence, nll


def top_logits_reference(logits: Tensor, top_words: Tensor, words: int) -> Tensor:
    """(tokens, words): logits (tokens, k) at top_words (tokens, k), and -inf elsewhere."""
    return logits.new_full((logits.shape[0], words), -torch.inf).scatter(1, top_words, logits)
