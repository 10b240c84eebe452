"""What `accelerate` can replace: one small object for each kind, tried in the order of this list."""

from __future__ import annotations

from .attention import AttentionReplacement
from .base import Left, Match, Replacement
from .embedding import EmbeddingReplacement
from .experts import ExpertsReplacement
from .lora import LoraReplacement
from .loss import LossReplacement
from .lycoris import LycorisReplacement
from .memory import MemoryReplacement
from .mlp import MlpReplacement
from .norm import NormReplacement
from .rotary import RotaryReplacement
from .tokens import TokensReplacement

REPLACEMENTS: tuple[Replacement, ...] = (
    EmbeddingReplacement(),
    TokensReplacement(),
    ExpertsReplacement(),
    LycorisReplacement(),
    LoraReplacement(),
    MlpReplacement(),
    AttentionReplacement(),
    NormReplacement(),
    RotaryReplacement(),
    LossReplacement(),
    MemoryReplacement(),  # after what it asks of MLPs
)

__all__ = ["REPLACEMENTS", "Left", "Match", "Replacement"]
