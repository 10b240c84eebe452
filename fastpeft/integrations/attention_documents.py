"""Packed documents, which a model hands to its attention function beside a mask that may know nothing of them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .attention_masks import document_bounds

Interval = tuple[Tensor, Tensor]


def documents(
    queries: int,
    keys: int,
    batch: int,
    causal: bool,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    seq_idx: Tensor | None,
) -> Interval | None:
    """start and stop, int32 (1 or batch, queries), of what each query may see of its own document; None without any.

    Args:
        queries, keys, batch: of the call.
        causal: the last query of a document stands at its last key.
        cu_seq_lens_q, cu_seq_lens_k: int32 (documents + 1,), the documents' ends among all tokens of the batch.
        seq_idx: (batch, tokens), the number of each token's document; read where there are no cu_seq_lens.
    """
    if cu_seq_lens_q is not None:
        ends_q = cu_seq_lens_q
        ends_k = ends_q if cu_seq_lens_k is None else cu_seq_lens_k
        token = torch.arange(batch * queries, device=ends_q.device, dtype=ends_q.dtype).view(batch, queries)
        row = torch.arange(batch, device=ends_q.device, dtype=ends_q.dtype)[:, None] * keys
        document = (torch.searchsorted(ends_q, token, right=True) - 1).clamp(0, max(ends_q.shape[0] - 2, 0))
        start, stop = ends_k[document], ends_k[document + 1]
        if causal:
            stop = torch.minimum(stop, token + 1 + stop - ends_q[document + 1])
        return (start - row).to(torch.int32), (stop - row).to(torch.int32)
    if seq_idx is not None and queries == keys and seq_idx.shape[-1] == queries:
        start, stop = document_bounds(seq_idx.view(-1, queries))
        return start.to(torch.int32), stop.to(torch.int32)
    return None


_last: tuple[weakref.ref[Tensor], int, Interval | None] | None = None
"""Of the positions that were looked at last: the layers of one forward share theirs."""


def restarted_documents(position_ids: Any, queries: int) -> Interval | None:
    """The same of positions that go back to 0 within a row, as packed ones do; None if they don't.

    FlashAttention's functions in transformers take such positions for documents too; `eager` and `sdpa` only without a
    cache and an attention mask.
    """
    global _last
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or position_ids.shape[1] != queries:
        return None
    if torch.compiler.is_compiling():
        return _restarted(position_ids)
    if position_ids.is_inference():  # has no version
        return _restarted(position_ids) if bool((position_ids[:, 1:] == 0).any()) else None
    known = _last
    if known is not None and known[0]() is position_ids and known[1] == position_ids._version:
        return known[2]
    found = _restarted(position_ids) if bool((position_ids[:, 1:] == 0).any()) else None
    _last = (weakref.ref(position_ids), position_ids._version, found)
    return found


def _restarted(position_ids: Tensor) -> Interval:
    restarts = position_ids == 0
    start, stop = document_bounds(restarts.cumsum(-1))
    return start.to(torch.int32), stop.to(torch.int32)
