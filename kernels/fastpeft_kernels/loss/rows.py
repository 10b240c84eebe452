"""Rows of logits, and walking them where PyTorch computes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_PIECE = 1 << 19  # elements, which bounds the temporaries


def as_rows(logits: Tensor) -> Tensor:
    """(..., words) as (tokens, words) with contiguous columns: a view where there can be one."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def pieces(logits: Tensor) -> Iterator[slice]:
    """Ranges of the rows of (tokens, words)."""
    tokens, words = logits.shape
    step = max(1, _PIECE // max(1, words))
    return (slice(row, row + step) for row in range(0, tokens, step))
