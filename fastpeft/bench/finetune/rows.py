"""What is learned: the same rows for every peer, made of nothing but a seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .sizes import CLASSES, SEQ2SEQ

SPECIAL = 4  # ids below are a tokenizer's own
PERIOD, REPEATED = 8, 0.5


def make_rows(task: str, words: int, count: int, tokens: int) -> dict[str, Tensor]:
    """Columns of ids without padding, in which there is something to learn.

    Words are drawn by Zipf's law, and each repeats the one `PERIOD` before it with probability `REPEATED`. A classifier
    tells whether a row's first id is odd; an encoder-decoder repeats the first quarter of what it reads.

    Args:
        task: one of those of `sizes`.
        words: of the vocabulary.

    Returns:
        "input_ids", "attention_mask" (count, tokens) and "labels", int64 on the CPU.
    """
    generator = torch.Generator().manual_seed(1)
    chances = 1.0 / torch.arange(10, words - SPECIAL + 10)
    drawn = torch.multinomial(chances, count * tokens, replacement=True, generator=generator).view(count, tokens)
    again = torch.rand(count, tokens, generator=generator) < REPEATED
    ids = drawn + SPECIAL
    for i in range(PERIOD, tokens):
        ids[:, i] = torch.where(again[:, i], ids[:, i - PERIOD], ids[:, i])
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == CLASSES:
        return {**columns, "labels": ids[:, 0] % 2}
    return {**columns, "labels": ids[:, : written(task, tokens)].clone()}


def written(task: str, tokens: int) -> int:
    """Tokens of a row's labels; what a decoder reads and learns is the same."""
    return max(1, tokens // 4) if task == SEQ2SEQ else tokens


def tokens_of_batch(task: str, rows: int, tokens: int) -> int:
    """Tokens that pass through the model in a step: read, and for an encoder-decoder written."""
    return rows * (tokens + (written(task, tokens) if task == SEQ2SEQ else 0))


def backwards(columns: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
    """The rows of each batch in reverse order."""
    order: Any = torch.arange(len(columns["input_ids"])).view(-1, batch).flip(1).flatten()
    return {name: column[order] for name, column in columns.items()}
