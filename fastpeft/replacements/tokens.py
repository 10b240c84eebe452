"""PEFT's trainable tokens -> the same layers, which do not copy the embedding or the head."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.tokens import FastTokens, fast_tokens, stock_tokens
from .swap import ClassSwap


class TokensReplacement(ClassSwap):
    """Trainable tokens over embeddings and over heads, tied to an embedding or not."""

    mixture = FastTokens

    def classes(self) -> dict[type[nn.Module], type[Any]]:
        return {stock_tokens(): fast_tokens()}
