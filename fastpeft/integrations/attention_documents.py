"""Packed documents, which a model hands to its attention function beside a mask that may know nothing of them.

The layers of a model get the same tensors: what is made of them is made once for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.attention.masks import Mask
from fastpeft_kernels.attention.ranges import packed, packed_by_index
from fastpeft_kernels.common.remembered import Remembered
from fastpeft_kernels.common.shapes import imitated


def documents(queries: int, keys: int, batch: int, causal: bool, given: dict[str, Any]) -> Mask | None:
    """What each query may see of its own document; None without any.

    Args:
        queries, keys, batch: of the call.
        causal: the last query of a document stands at its last key.
        given: `cu_seq_lens_q` and `cu_seq_lens_k`, int32 (documents + 1,), among all tokens of the batch, one row after
            the other; or `seq_idx`, (batch or 1, tokens), the number of each token's document.
    """
    if (ends_q := given.get("cu_seq_lens_q")) is not None:
        ends_k = given.get("cu_seq_lens_k")
        return _by_ends(ends_q, ends_q if ends_k is None else ends_k, queries, keys, batch, causal)
    index = given.get("seq_idx")
    if index is not None and queries == keys and index.shape[-1] == queries:
        return _by_index(index, queries, causal)
    return None


def _of_ends(ends_q: Tensor, ends_k: Tensor, queries: int, keys: int, batch: int, causal: bool) -> Mask:
    found = packed(ends_q, batch * queries, ends_k, batch * keys, causal=causal)
    if batch == 1:
        return found
    assert found.start is not None and found.stop is not None
    row = torch.arange(batch, device=ends_q.device, dtype=torch.int32)[:, None] * keys
    return Mask(start=found.start.view(batch, queries) - row, stop=found.stop.view(batch, queries) - row)


def _of_index(index: Tensor, queries: int, causal: bool) -> Mask:
    return packed_by_index(index.view(-1, queries), causal=causal)


def within(mask: Mask, documents: Mask) -> Mask:
    """Both, of which the second has but start and stop."""
    start, stop = documents.start, documents.stop
    if mask.start is not None and mask.stop is not None and start is not None and stop is not None:
        start, stop = _both(mask.start, mask.stop, start, stop)
    return replace(mask, start=start, stop=stop)


def _of_both(start: Tensor, stop: Tensor, first: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    return torch.maximum(start, first), torch.minimum(stop, end)


def restarted_documents(
    position_ids: Any, queries: int, seen_keys: Callable[[], Tensor | None] = lambda: None
) -> Mask | None:
    """The same, causal, of positions that go back to 0 within a row, as packed ones do; None if they don't.

    FlashAttention's functions in transformers take such positions for documents too; `eager` and `sdpa` only without a
    cache and an attention mask.

    Args:
        position_ids: (batch or 1, queries); anything else has no documents.
        queries: of the call, and as many keys.
        seen_keys: gives bool (batch or 1, queries), False for padding, whose positions say nothing, or None.
    """
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or position_ids.shape[1] != queries:
        return None
    if torch.compiler.is_compiling():
        return _restarted(position_ids, seen_keys())
    found = _by_positions(position_ids)
    if found is None or (seen := seen_keys()) is None:
        return found
    return _restarted(position_ids, seen)


def _of_positions(position_ids: Tensor) -> Mask | None:
    """Waits for the GPU. A model without values has no documents."""
    if imitated(position_ids.device) or not bool((position_ids[:, 1:] == 0).any()):
        return None
    return _restarted(position_ids, None)


def _restarted(position_ids: Tensor, seen: Tensor | None) -> Mask:
    begins = position_ids == 0
    return packed_by_index((begins if seen is None else begins & seen).cumsum(-1))


_by_ends, _by_index = Remembered(_of_ends), Remembered(_of_index)
_by_positions, _both = Remembered(_of_positions), Remembered(_of_both)
