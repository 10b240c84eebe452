"""Losses over a vocabulary: from hidden states and a head, without logits; or from logits, in one pass."""

from .api import LinearLoss, linear_cross_entropy
from .cross_entropy import cross_entropy
from .distillation import LinearDistillation, linear_distillation
from .divergence import kl_divergence
from .head import Head, Options, Teacher, TopLogits
from .preference import DpoLoss, dpo_loss

__all__ = [
    "DpoLoss",
    "Head",
    "LinearDistillation",
    "LinearLoss",
    "Options",
    "Teacher",
    "TopLogits",
    "cross_entropy",
    "dpo_loss",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_distillation",
]
