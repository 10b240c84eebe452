"""Published models by their sizes, which with random weights cost what the real ones cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

CAUSAL, CLASSES, SEQ2SEQ = "causal-lm", "classification", "seq2seq-lm"


@dataclass(frozen=True)
class Sizes:
    """A model's, as its published config.json has them.

    Attributes:
        kind: transformers' `model_type`.
        inner: width of the MLPs.
        layers: of the decoder, or of the encoder; an encoder-decoder has as many of both.
        key_heads: that share keys and values.
        words: of the vocabulary.
        more: other keys of the configuration.
    """

    kind: str
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    words: int
    more: tuple[tuple[str, Any], ...] = ()

    def scaled(self, hidden: int, head_dim: int, layers: int, words: int) -> Sizes:
        """The same shape, narrower: its ratios of MLP to width and of heads to key heads, and no more layers."""
        heads = hidden // head_dim
        return replace(
            self,
            hidden=hidden,
            inner=max(1, round(self.inner / self.hidden * hidden / 32)) * 32,
            layers=min(layers, self.layers),
            heads=heads,
            key_heads=max(1, heads * self.key_heads // self.heads),
            head_dim=head_dim,
            words=min(words, self.words),
        )


def _theta(base: float) -> tuple[str, Any]:
    return "rope_parameters", {"rope_type": "default", "rope_theta": base}


TIED, UNTIED = ("tie_word_embeddings", True), ("tie_word_embeddings", False)
MODELS = {
    "llama-3.1-8b": Sizes("llama", 4096, 14336, 32, 32, 8, 128, 128256, (_theta(5e5), UNTIED, ("rms_norm_eps", 1e-5))),
    "llama-3.2-1b": Sizes("llama", 2048, 8192, 16, 32, 8, 64, 128256, (_theta(5e5), TIED, ("rms_norm_eps", 1e-5))),
    "mistral-7b-v0.3": Sizes(
        "mistral", 4096, 14336, 32, 32, 8, 128, 32768, (_theta(1e6), UNTIED, ("sliding_window", None))
    ),
    "qwen2.5-7b": Sizes("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, (_theta(1e6), UNTIED)),
    "qwen3-0.6b": Sizes("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, (_theta(1e6), TIED)),
    "qwen3-8b": Sizes("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, (_theta(1e6), UNTIED)),
    "gemma-3-4b": Sizes("gemma3_text", 2560, 10240, 34, 8, 4, 256, 262208, (("sliding_window", 1024), TIED)),
    "bert-base": Sizes("bert", 768, 3072, 12, 12, 12, 64, 30522),
    "roberta-base": Sizes("roberta", 768, 3072, 12, 12, 12, 64, 50265, (("type_vocab_size", 1),)),
    "t5-base": Sizes("t5", 768, 3072, 12, 12, 12, 64, 32128),
    "flan-t5-base": Sizes("t5", 768, 2048, 12, 12, 12, 64, 32128, (("feed_forward_proj", "gated-gelu"), UNTIED)),
    "bart-base": Sizes("bart", 768, 3072, 6, 12, 12, 64, 50265),
}
"""By the name on the command line. Gemma 3 is its text model."""
SCALES: dict[str, Callable[[Sizes], Sizes]] = {
    "tiny": lambda sizes: sizes.scaled(hidden=64, head_dim=16, layers=2, words=512),
    "small": lambda sizes: sizes.scaled(hidden=256, head_dim=64, layers=4, words=4096),
    "full": lambda sizes: sizes,
}
"""What two CPU cores train in a second, what they train in seconds a run, and what was published."""
_TASKS = {"bert": CLASSES, "roberta": CLASSES, "t5": SEQ2SEQ, "bart": SEQ2SEQ}


def sizes_of(model: str, scale: str, layers: int | None = None) -> Sizes:
    """Of a name in `MODELS`, at a scale.

    Args:
        model, scale: keys of MODELS and SCALES.
        layers: in place of what these say.
    """
    sizes = SCALES[scale](MODELS[model])
    return replace(sizes, layers=layers) if layers else sizes


def task_of(kind: str) -> str:
    """What a `model_type` of MODELS is trained to do."""
    return _TASKS.get(kind, CAUSAL)


def config_of(sizes: Sizes, tokens: int) -> Any:
    """transformers' configuration.

    Args:
        tokens: of the longest row; learned positions are as many, if those of the published model are fewer.
    """
    from transformers import AutoConfig

    return AutoConfig.for_model(sizes.kind, **_keys(sizes, tokens))


def _keys(sizes: Sizes, tokens: int) -> dict[str, Any]:
    more = dict(sizes.more)
    if sizes.kind == "t5":
        keys: dict[str, Any] = {
            "d_model": sizes.hidden, "d_kv": sizes.head_dim, "d_ff": sizes.inner, "num_layers": sizes.layers,
            "num_heads": sizes.heads, "vocab_size": sizes.words, "decoder_start_token_id": 0,
        }  # fmt: skip
    elif sizes.kind == "bart":
        keys = {"d_model": sizes.hidden, "vocab_size": sizes.words, "max_position_embeddings": max(1024, tokens)}
        for stack in ("encoder", "decoder"):
            keys |= {f"{stack}_layers": sizes.layers, f"{stack}_attention_heads": sizes.heads}
            keys[f"{stack}_ffn_dim"] = sizes.inner
    else:
        keys = {
            "hidden_size": sizes.hidden, "intermediate_size": sizes.inner, "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads, "vocab_size": sizes.words,
        }  # fmt: skip
        if task_of(sizes.kind) == CAUSAL:
            keys |= {"num_key_value_heads": sizes.key_heads, "head_dim": sizes.head_dim}
            keys["max_position_embeddings"] = max(32768, tokens)
        else:
            keys["max_position_embeddings"] = max(512, tokens)
    if sizes.kind == "roberta":  # it counts positions from 2
        more["max_position_embeddings"] = max(514, tokens + 2)
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | keys | more
