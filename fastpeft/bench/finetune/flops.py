"""How much work a training step is.

For a frozen matrix of n parameters that reads T tokens, 2 n T operations forward and 2 n T for the gradient of what it
reads: 4 N T in all for LoRA's base, its head among them. Adapters, and whatever else is trained, have a gradient of
their own: 6 n T. (Full fine-tuning is 6 N T.) Attention multiplies queries by keys and weights by values, 4 w a pair of
query and key that see each other, w being the width of all heads together, and twice that backward: 12 w a pair.
Recomputation is no work that was asked for and does not count; nor do embeddings, norms and activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from fastpeft.integrations.transformers import is_conv1d

FROZEN, TRAINED, ATTENTION = 4, 6, 12


class Attention(NamedTuple):
    """One kind of it in a model: how many layers, and pairs of query and key that see each other in a row."""

    layers: int
    pairs: int
    width: int


def step_flops(model: nn.Module, batch: dict[str, Any]) -> float:
    """Operations of a training step: of the linear layers, as one forward without gradients meets them, and attention.

    Args:
        model: with adapters; transformers' or PEFT's.
        batch: what its forward takes; rows are full, without padding.

    Returns:
        0 where weights are stacks, as of experts: what a token takes of them is not counted here.
    """
    if any(parameter.ndim == 3 and parameter.shape[0] > 1 for parameter in model.parameters()):
        return 0.0
    counted = 0.0

    def count(module: Any, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> None:
        nonlocal counted
        size = inputs[0].shape[-1] * outputs.shape[-1]
        tokens = inputs[0].numel() // inputs[0].shape[-1]
        counted += (TRAINED if module.weight.requires_grad else FROZEN) * size * tokens

    linear = [module for module in model.modules() if isinstance(module, nn.Linear) or is_conv1d(module)]
    hooks = [module.register_forward_hook(count) for module in linear]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    rows, tokens = batch["input_ids"].shape
    labels = batch["labels"]
    causal = labels.ndim == 2  # a label a token, which an encoder that classifies has not
    written = labels.shape[1] if causal else tokens
    found = attention(model.config, tokens, written, causal)
    return counted + sum(ATTENTION * rows * each.layers * each.pairs * each.width for each in found)


def attention(config: Any, tokens: int, written: int, causal: bool) -> Iterator[Attention]:
    """What attention a model of this configuration runs on a row.

    Args:
        config: transformers', of a decoder, an encoder, or both.
        tokens: that it reads.
        written: that an encoder-decoder writes.
        causal: whether a token of a model with one stack sees none after it.
    """
    text = config.get_text_config()
    if config.is_encoder_decoder:
        heads, layers = text.num_attention_heads, text.num_hidden_layers
        width = heads * (getattr(text, "d_kv", None) or text.hidden_size // heads)
        written_layers = getattr(text, "num_decoder_layers", None) or getattr(text, "decoder_layers", layers)
        yield Attention(layers, tokens * tokens, width)
        yield Attention(written_layers, causal_pairs(written), width)
        yield Attention(written_layers, written * tokens, width)
        return
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    if not causal:
        yield Attention(text.num_hidden_layers, tokens * tokens, width)
        return
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    for kind in kinds:
        window = text.sliding_window if kind == "sliding_attention" else None
        yield Attention(1, causal_pairs(tokens, window), width)


def causal_pairs(tokens: int, window: int | None = None) -> int:
    """Pairs of a query and a key that is not after it, nor `window` or more before it."""
    reach = min(tokens, window or tokens)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach
