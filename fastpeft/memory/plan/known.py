"""Configurations of some well-known models, so that a plan needs neither files nor a network."""

from __future__ import annotations

from typing import Any

_LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
}


def _sizes(hidden: int, inner: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        **others,
    }  # fmt: skip


KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b": ("llama", _sizes(2048, 8192, 16, 32, **_LLAMA, tie_word_embeddings=True)),
    "llama-3.2-3b": ("llama", _sizes(3072, 8192, 28, 24, **_LLAMA, tie_word_embeddings=True)),
    "llama-3.1-8b": ("llama", _sizes(4096, 14336, 32, 32, **_LLAMA, tie_word_embeddings=False)),
    "llama-3.1-70b": ("llama", _sizes(8192, 28672, 80, 64, **_LLAMA, tie_word_embeddings=False)),
    "qwen3-14b": ("qwen3", _sizes(5120, 17408, 40, 40, **_QWEN, tie_word_embeddings=False)),
    "qwen3-32b": ("qwen3", _sizes(5120, 25600, 64, 64, **_QWEN, tie_word_embeddings=False)),
}
"""(model_type, options of its configuration) by name."""


def known_config(name: str) -> Any:
    """transformers' configuration of one of KNOWN."""
    from transformers import AutoConfig

    kind, options = KNOWN[name]
    return AutoConfig.for_model(kind, **options)
