"""Matrices with some rows replaced in plain PyTorch, in any floating dtype: the oracle, which copies the matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def token_embedding_reference(
    ids: Tensor, weight: Tensor, rows: Tensor, tokens: Sequence[int], padding_idx: int | None = None
) -> Tensor:
    """(..., features) in the dtype of weight, differentiable in rows."""
    return F.embedding(ids, _replaced(weight, rows, tokens), padding_idx)


def token_linear_reference(x: Tensor, weight: Tensor, rows: Tensor, tokens: Sequence[int]) -> Tensor:
    """(..., vocabulary) in the dtype of x, differentiable in x and rows."""
    return F.linear(x, _replaced(weight, rows, tokens))


def _replaced(weight: Tensor, rows: Tensor, tokens: Sequence[int]) -> Tensor:
    index = torch.tensor(tokens, dtype=torch.int64, device=weight.device)
    return weight.index_copy(0, index, rows.to(weight.dtype))
