"""PEFT's trainable tokens: what a layer of them holds, read at each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft_kernels.tokens.validation import are_distinct

from .tuner_layers import why_not_active, why_not_plain


class TrainedTokens(NamedTuple):
    """As of `fastpeft_kernels.tokens`.

    Attributes:
        weight: (vocabulary, features), the base's.
        rows: (count, features), of all adapters in order.
        tokens: which rows of weight they replace.
    """

    weight: Tensor
    rows: Tensor
    tokens: tuple[int, ...]


def token_layers(module: nn.Module) -> list[nn.Module]:
    """What computes in the place of an embedding or a head that PEFT has wrapped to train some tokens of it; empty for
    any other module."""
    from peft.utils.other import TrainableTokensWrapper

    return [module.token_adapter] if isinstance(module, TrainableTokensWrapper) else []


def trained_tokens(layer: Any, names: Sequence[str], device: torch.device) -> TrainedTokens | str:
    """What the adapters `names` train, or why PEFT's own forward must run.

    Args:
        layer: TrainableTokensLayer of PEFT. It reads its base's weight and does not call it.
        device: of the input.
    """
    reason = why_not_active(layer)
    if reason is not None:
        return reason
    base, deltas = layer._modules["base_layer"], layer.trainable_tokens_delta
    if not isinstance(base, (nn.Embedding, nn.Linear)):
        return f"a base layer of type {type(base).__name__}"
    if not names or any(name not in deltas for name in names):
        return "no adapter that is active"
    if isinstance(base, nn.Embedding) and (base.max_norm is not None or base.scale_grad_by_freq or base.sparse):
        return "an embedding with max_norm, scale_grad_by_freq or sparse gradients"
    weight, rows = base._parameters.get("weight"), [deltas[name] for name in names]
    if weight is None:
        return "weight of the base layer held elsewhere"
    for parameter in (weight, *rows):
        reason = why_not_plain(parameter, device)
        if reason is not None:
            return reason
    if weight.requires_grad:
        return "the base weight is trained"
    if not weight.is_floating_point():
        return f"a base weight in {weight.dtype}"
    tokens = tuple([token for name in names for token in layer.token_indices[name]])
    if not are_distinct(tokens, weight.shape[0]):
        return "tokens that come twice, or are none"
    return TrainedTokens(weight, rows[0] if len(rows) == 1 else torch.cat(rows), tokens)
