"""Losses over a vocabulary: from hidden states and a head, without logits; or from logits, in one pass."""

from .api import LinearLoss, linear_cross_entropy
from .head import Head, Options

__all__ = ["Head", "LinearLoss", "Options", "linear_cross_entropy"]
