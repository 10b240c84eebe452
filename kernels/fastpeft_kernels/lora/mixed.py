"""Mixed batches: each token has an adapter of its own.

S = x A^T is made for all adapters side by side, as ever, with zeros where a column's adapter is not the token's; so is
dS. Nothing else knows of it: no loop over adapters, no gathering of tokens, no product more. That is n times the rank's
arithmetic for n adapters: at rank 16 beside a frozen product of 4096 features 0.8 % of it for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..common.validation import check_instance
from .projection import Group, LoraProjection


def keep_own_(s: Tensor, group: Group) -> Tensor:
    """s with zeros where its column's adapter is not the token's, written in place; as it is if the batch is not mixed.

    Args:
        s: (tokens, total rank).
    """
    if group.adapter_index is None:
        return s
    owners = tuple((adapter.index, adapter.rank) for p in group.projections for adapter in p.adapters)
    return s.masked_fill_(group.adapter_index.unsqueeze(1) != _columns(owners, s.device), 0.0)


@lru_cache(maxsize=256)
def _columns(owners: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """The index of the adapter of each column, (total rank,); kept, for its copy to a GPU waits."""
    with torch.inference_mode(False):
        return torch.tensor([index for index, rank in owners for _ in range(rank)], device=device)


def check_adapter_index(adapter_index: Tensor, x: Tensor, projections: Sequence[LoraProjection]) -> None:
    """Raise TypeError or ValueError, naming the argument, unless it fits x (..., in_features)."""
    check_instance("adapter_index", adapter_index, Tensor)
    if adapter_index.dtype != torch.int64 or adapter_index.shape != x.shape[:-1] or adapter_index.device != x.device:
        raise ValueError(
            f"adapter_index: expected int64 {tuple(x.shape[:-1])} on {x.device}, "
            f"got {adapter_index.dtype} {tuple(adapter_index.shape)} on {adapter_index.device}"
        )
    if any(adapter.bias is not None for projection in projections for adapter in projection.adapters):
        raise ValueError("adapter_index: expected adapters without bias in a mixed batch, got one with")
    if any(projection.magnitude is not None for projection in projections):
        raise ValueError("adapter_index: expected projections without magnitude in a mixed batch, got one with")
