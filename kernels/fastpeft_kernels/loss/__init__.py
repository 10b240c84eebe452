"""Losses over a vocabulary: from hidden states and a head, without logits; or from logits, in one pass."""

from .api import LinearLoss, linear_cross_entropy
from .cross_entropy import cross_entropy
from .divergence import kl_divergence
from .head import Head, Options

__all__ = ["Head", "LinearLoss", "Options", "cross_entropy", "kl_divergence", "linear_cross_entropy"]
