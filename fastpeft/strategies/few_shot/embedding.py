"""One vector a text: the mean of its tokens' last hidden states, of length one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def padded(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch, padded at the end: places in a row must not depend on its batch."""
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = "right"
    inputs = [{name: row[name] for name in MODEL_INPUTS if name in row} for row in rows]
    return dict(tokenizer.pad(inputs, return_tensors="pt"))


def embed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Embeddings of a padded batch.

    Args:
        model: gives last_hidden_state (rows, tokens, width).
        batch: input_ids and attention_mask (rows, tokens).

    Returns:
        (rows, width) in float32, each of length one, so that a product is the cosine.
    """
    hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=-1)
