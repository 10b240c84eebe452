"""Checks of the arguments of both ops."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_device, check_floating, check_instance


def check_matrix(weight: Any, rows: Any, tokens: Any, device: torch.device, like: str) -> None:
    """Raise TypeError or ValueError unless `rows` can stand in the place of the rows `tokens` of a frozen matrix.

    Args:
        device: of the argument `like`.
    """
    check_floating("weight", weight)
    check_floating("rows", rows)
    check_instance("tokens", tokens, tuple)
    check_device("weight", weight.device, device, like)
    check_device("rows", rows.device, device, like)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape (vocabulary, features), got {tuple(weight.shape)}")
    if weight.requires_grad:
        raise ValueError("weight: expected a tensor without gradient, got one that requires it")
    if rows.shape != (len(tokens), weight.shape[1]):
        raise ValueError(f"rows: expected shape {(len(tokens), weight.shape[1])}, got {tuple(rows.shape)}")
    if not are_distinct(tokens, weight.shape[0]):
        raise ValueError(f"tokens: expected one or more distinct integers in [0, {weight.shape[0]}), got {tokens}")


def check_ids(ids: Any) -> None:
    """Raise TypeError unless they are integers that index."""
    check_instance("ids", ids, Tensor)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids: expected int64 or int32, got {ids.dtype}")


def check_padding_idx(padding_idx: Any, vocabulary: int) -> int | None:
    """The row that it names, counted from the first. Raise TypeError or ValueError unless it is one."""
    if padding_idx is None:
        return None
    check_instance("padding_idx", padding_idx, int)
    if not -vocabulary <= padding_idx < vocabulary:
        raise ValueError(f"padding_idx: expected an integer in [{-vocabulary}, {vocabulary}), got {padding_idx}")
    return int(padding_idx) % vocabulary


def check_x(x: Any, weight: Any) -> None:
    """Raise TypeError or ValueError unless weight can multiply it."""
    check_floating("x", x)
    features = weight.shape[-1] if isinstance(weight, Tensor) and weight.dim() else None
    if x.dim() < 1 or features not in (None, x.shape[-1]):
        raise ValueError(f"x: expected shape (..., {features}), got {tuple(x.shape)}")


def are_distinct(tokens: tuple[Any, ...], vocabulary: int) -> bool:
    """Whether they are one or more words, and each comes once."""
    if not all([type(token) is int for token in tokens]):  # which tuples that are equal need not share
        return False
    return (_looked_at if torch.compiler.is_compiling() else _kept)(tokens, vocabulary)


def _looked_at(tokens: tuple[int, ...], vocabulary: int) -> bool:
    return all(0 <= token < vocabulary for token in tokens) and len(set(tokens)) == len(tokens) > 0


_kept = lru_cache(maxsize=64)(_looked_at)
