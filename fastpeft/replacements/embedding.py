"""PEFT's LoRA on an embedding -> the same layer with its update in one pass."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.embedding import FastEmbedding, fast_embedding, stock_embedding
from .swap import ClassSwap


class EmbeddingReplacement(ClassSwap):
    """LoRA over nn.Embedding and its subclasses, which are called as they are."""

    mixture = FastEmbedding

    def classes(self) -> dict[type[nn.Module], type[Any]]:
        return {stock_embedding(): fast_embedding()}
