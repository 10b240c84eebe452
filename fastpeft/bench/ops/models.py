"""Shapes of real models, from their published configurations."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..finetune.sizes import MODELS


class Shape(NamedTuple):
    """Sizes of a model's layers; `activation` as its configuration names it.

    Attributes:
        gated: the MLP has a gate.
        biased: the projections have biases.
        joined: one projection gives gate and up.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    activation: str = "silu"
    gated: bool = True
    biased: bool = False
    joined: bool = False

    @property
    def q_size(self) -> int:
        """Outputs of the query's projection."""
        return self.heads * self.head_dim

    @property
    def kind(self) -> str:
        """The activation, as our ops name it."""
        return self.activation.replace("gelu_pytorch_tanh", "gelu_tanh")

    @property
    def kv_size(self) -> int:
        """Outputs of the key's projection, and of the value's."""
        return self.kv_heads * self.head_dim


def _published(name: str, **more: Any) -> Shape:
    """Of a model whose sizes the fine-tuning benchmark has, too."""
    sizes = MODELS[name.lower()]
    shared = (sizes.hidden, sizes.inner, sizes.heads, sizes.key_heads, sizes.head_dim, sizes.words)
    return Shape(name, *shared, **more)


LLAMA_1B = _published("Llama-3.2-1B")
LLAMA_8B = _published("Llama-3.1-8B")
LLAMA_70B = Shape("Llama-3.1-70B", 8192, 28672, 64, 8, 128, 128_256)
QWEN3_600M = _published("Qwen3-0.6B")
QWEN3_4B = Shape("Qwen3-4B", 2560, 9728, 32, 8, 128, 151_936)
QWEN3_32B = Shape("Qwen3-32B", 5120, 25600, 64, 8, 128, 151_936)
GEMMA3_4B = _published("Gemma-3-4B", activation="gelu_pytorch_tanh")
BERT_BASE = _published("BERT-base", activation="gelu", gated=False, biased=True)
T5_BASE = _published("T5-base", activation="relu", gated=False)
MODERNBERT_BASE = Shape("ModernBERT-base", 768, 1152, 12, 12, 64, 50_368, "gelu", joined=True)
