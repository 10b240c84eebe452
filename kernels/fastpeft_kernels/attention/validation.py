"""What attention takes. Messages name the argument, what was expected and what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.validation import FLOATING, check_floating, check_instance
from .masks import Mask
from .scores import Scores


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise TypeError or ValueError unless they fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dtype not in FLOATING:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: expected a tensor in fp64, fp32, bf16 or fp16, got {got}")
        if x.dim() != 4:
            raise ValueError(f"{name}: expected (batch, heads, tokens, features), got shape {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name}: expected {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
    (batch, heads, _, features), (_, kv_heads, keys, _) = q.shape, k.shape
    if k.shape[0] != batch or k.shape[3] != features:
        raise ValueError(f"k: expected batch {batch} and {features} features like q, got shape {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: expected ({batch}, {kv_heads}, {keys}, v_features) like k, got shape {tuple(v.shape)}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {kv_heads}")


def check_mask(mask: Mask, q: Tensor, k: Tensor) -> None:
    """Raise TypeError or ValueError unless the mask is one for q and k."""
    check_instance("mask", mask, Mask)
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    for name in ("left", "right"):
        value = getattr(mask, name)
        if isinstance(value, (Tensor, float, bool)):
            raise TypeError(f"mask.{name}: expected an integer or None, got {type(value).__name__}")
    if (mask.start is None) != (mask.stop is None):
        given, missing = ("stop", "start") if mask.start is None else ("start", "stop")
        raise ValueError(f"mask.{missing}: expected a tensor with mask.{given}, got None")
    for name, x, dtype, columns in (
        ("start", mask.start, torch.int32, queries),
        ("stop", mask.stop, torch.int32, queries),
        ("keys", mask.keys, torch.bool, keys),
    ):
        if x is not None:
            _check(f"mask.{name}", x, dtype, q)
            if x.dim() != 2 or x.shape[0] not in (1, batch) or x.shape[1] != columns:
                raise ValueError(f"mask.{name}: expected shape (1 or {batch}, {columns}), got {tuple(x.shape)}")
    if mask.dense is not None:
        _check("mask.dense", mask.dense, torch.bool, q)
        _check_broadcasts("mask.dense", mask.dense, (batch, heads, queries, keys))


def check_scores(scores: Scores, q: Tensor, k: Tensor) -> None:
    """Raise TypeError or ValueError unless they are scores of q and k. A seed may be missing."""
    _check_number("scale", scores.scale, -math.inf)
    if scores.softcap is not None:
        _check_number("softcap", scores.softcap, 0.0)
    if scores.dropout != 0.0:
        check_instance("dropout", scores.dropout, float, int)
        if not 0.0 <= scores.dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {scores.dropout}")
    if scores.relative is not None:
        _check_shape("relative", scores.relative, None, q, (q.shape[1], q.shape[2] + k.shape[2] - 1))
    if scores.bias is not None:
        _check("bias", scores.bias, None, q)
        _check_broadcasts("bias", scores.bias, (*q.shape[:3], k.shape[2]))
    if scores.sinks is not None:
        _check_shape("sinks", scores.sinks, None, q, (q.shape[1],))
    if scores.seed is not None:
        _check_shape("seed", scores.seed, torch.int64, q, (1,))


def _check_number(name: str, value: float, low: float) -> None:
    check_instance(name, value, float, int)
    if not low < value < math.inf:
        raise ValueError(f"{name}: expected a finite number{' above 0' if low == 0.0 else ''}, got {value}")


def _check_shape(name: str, x: Tensor, dtype: torch.dtype | None, q: Tensor, shape: tuple[int, ...]) -> None:
    _check(name, x, dtype, q)
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")


def _check(name: str, x: Tensor, dtype: torch.dtype | None, q: Tensor) -> None:
    """`dtype` None is any floating one."""
    if dtype is None:
        check_floating(name, x)
    else:
        check_instance(name, x, Tensor)
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name}: expected a tensor on {q.device} like q, got {x.device}")


def _check_broadcasts(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    fits = x.dim() <= 4 and all(
        have in (1, want) for have, want in zip(reversed(x.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {tuple(x.shape)}")
