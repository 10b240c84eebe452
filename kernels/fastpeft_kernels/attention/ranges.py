"""Masks of what models and collators have. Nothing here waits for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.validation import check_instance
from .masks import Mask

_INT = torch.int32
_INTEGERS = (torch.int32, torch.int64)


def causal(window: int | None = None) -> Mask:
    """Each query sees its own position and those before, `window` of them, its own among them; None for all."""
    if window is not None:
        _check_positive("window", window)
    return Mask(left=None if window is None else window - 1, right=0)


def padding(attention_mask: Tensor) -> Mask:
    """No query sees what is padding.

    Args:
        attention_mask: (batch or 1, keys), zero or False for padding, anywhere.
    """
    _check_matrix("attention_mask", attention_mask, (torch.bool, *_INTEGERS, torch.float32))
    return Mask(keys=attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0)


def packed(
    cu_seqlens_q: Tensor,
    queries: int,
    cu_seqlens_k: Tensor | None = None,
    keys: int | None = None,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] = (None, None),
) -> Mask:
    """Documents one after the other in one row; a query sees keys of its own document.

    In a document the last query stands at the last key ("bottom-right"), as in flash_attn_varlen_func. What follows the
    last document sees nothing and is seen by nobody.

    Args:
        cu_seqlens_q: int32 or int64 (documents + 1,), where each document's queries begin, 0 first. Documents may be
            empty.
        queries: number of queries in the row, the last document's end at least.
        cu_seqlens_k, keys: the same of the keys, as many documents; those of the queries by default.
        causal: whether a query sees no key behind its own position.
        window: how many keys (before, behind) its position a query sees besides; None for all.
    """
    own = cu_seqlens_k is None
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    keys = queries if keys is None else keys
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_instance(name, x, Tensor)
        if x.dtype not in _INTEGERS:
            raise TypeError(f"{name}: expected int32 or int64, got {x.dtype}")
        if x.dim() != 1 or x.shape[0] < 2:
            raise ValueError(f"{name}: expected shape (documents + 1,), got {tuple(x.shape)}")
    expected, got = tuple(cu_seqlens_q.shape), tuple(cu_seqlens_k.shape)
    if got != expected:
        raise ValueError(f"cu_seqlens_k: expected shape {expected} like cu_seqlens_q, got {got}")
    if own and keys != queries:
        raise ValueError(f"cu_seqlens_k: expected a tensor for {keys} keys of {queries} queries, got None")
    query = torch.arange(queries, device=cu_seqlens_q.device)
    document = torch.searchsorted(cu_seqlens_q[1:].contiguous(), query, right=True)
    last = cu_seqlens_q.shape[0] - 2
    inside = document <= last
    document = document.clamp(max=last)
    first, end = cu_seqlens_k[document], cu_seqlens_k[document + 1]
    position = query + end - cu_seqlens_q[document + 1]
    start, stop = _within(first, end, position, causal, window)
    # Never decreasing, also where nothing is seen
    nothing = torch.full_like(start, keys)
    return _mask(torch.where(inside, start, nothing), torch.where(inside, stop, nothing))


def packed_by_position(
    position_ids: Tensor, *, causal: bool = True, window: tuple[int | None, int | None] = (None, None)
) -> Mask:
    """Documents one after the other; one begins where the position is not that before plus 1, as in transformers.

    Args:
        position_ids: int32 or int64 (batch or 1, tokens).
        causal, window: as in `packed`.
    """
    _check_matrix("position_ids", position_ids, _INTEGERS)
    return _documents(position_ids.diff(dim=1) != 1, causal, window)


def packed_by_index(
    seq_idx: Tensor, *, causal: bool = True, window: tuple[int | None, int | None] = (None, None)
) -> Mask:
    """Documents one after the other; one begins where the number changes.

    Args:
        seq_idx: int32 or int64 (batch or 1, tokens).
        causal, window: as in `packed`.
    """
    _check_matrix("seq_idx", seq_idx, _INTEGERS)
    return _documents(seq_idx.diff(dim=1) != 0, causal, window)


def chunked(
    chunk: int, queries: int, keys: int, device: torch.device | str = "cpu", first: Tensor | None = None
) -> Mask:
    """Causal, and only within chunks of so many positions (Llama 4).

    Args:
        chunk: keys in a chunk.
        queries, keys: the last query stands at the last key.
        device: of the mask, where `first` is None.
        first: int32 or int64 (batch or 1,), where the first chunk begins: the number of left padding.
    """
    _check_positive("chunk", chunk)
    position = torch.arange(queries, device=device if first is None else first.device)[None] + (keys - queries)
    if first is None:
        first = position.new_zeros(1)
    begin = first[:, None]
    start = begin + (position - begin).div(chunk, rounding_mode="floor") * chunk
    return _mask(start, (position + 1).expand_as(start))


def prefix(length: Tensor, queries: int, keys: int) -> Mask:
    """Causal, and every query sees the first keys too (prefix LM).

    Args:
        length: int32 or int64 (batch or 1,), how many keys all see.
        queries, keys: the last query stands at the last key.
    """
    check_instance("length", length, Tensor)
    if length.dtype not in _INTEGERS or length.dim() != 1:
        raise ValueError(f"length: expected int32 or int64 (batch or 1,), got {length.dtype} {tuple(length.shape)}")
    position = torch.arange(queries, device=length.device)[None] + (keys - queries)
    stop = torch.maximum(position + 1, length[:, None]).clamp(max=keys)
    return _mask(torch.zeros_like(stop), stop)


def _documents(changes: Tensor, causal: bool, window: tuple[int | None, int | None]) -> Mask:
    """`changes`: bool (batch, tokens - 1), whether a document begins at the token after."""
    batch, tokens = changes.shape[0], changes.shape[1] + 1
    position = torch.arange(tokens, device=changes.device).expand(batch, tokens)
    begins = torch.nn.functional.pad(changes, (1, 0), value=True)
    ends = torch.nn.functional.pad(changes, (0, 1), value=True)
    first = torch.where(begins, position, 0).cummax(1).values
    end = torch.where(ends, position + 1, tokens).flip(1).cummin(1).values.flip(1)
    return _mask(*_within(first, end, position, causal, window))


def _within(
    first: Tensor, end: Tensor, position: Tensor, causal: bool, window: tuple[int | None, int | None]
) -> tuple[Tensor, Tensor]:
    """(start, stop) of queries at `position` in documents [first, end); a query that sees nothing has stop = start."""
    left, right = window
    for name, bound in (("left", left), ("right", right)):
        if bound is not None and (type(bound) is not int or bound < 0):
            raise ValueError(f"window: expected {name} to be an integer of 0 or more, or None, got {bound!r}")
    right = 0 if causal else right
    start = first if left is None else torch.maximum(first, position - left)
    stop = end if right is None else torch.minimum(end, position + right + 1)
    return start, torch.maximum(start, stop)


def _mask(start: Tensor, stop: Tensor) -> Mask:
    if start.dim() == 1:
        start, stop = start[None], stop[None]
    return Mask(start=start.to(_INT), stop=stop.to(_INT))


def _check_positive(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected an integer above 0, got {value!r}")


def _check_matrix(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check_instance(name, x, Tensor)
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, dtypes))}, got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{name}: expected (batch or 1, tokens), got shape {tuple(x.shape)}")
