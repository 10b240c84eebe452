"""What all attention kernels are given, as keyword arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..common.random import keep_threshold
from .masks import Mask
from .relative import UNIT, in_copies
from .scores import Scores
from .tiles import block_of

_LOG2E = math.log2(math.e)
UNSPECIALISED = [
    *("queries", "keys", "kv_heads", "group", "left", "right", "bounds_batch", "padding_batch", "relative_head"),
    "relative_copy",
    *(f"{name}_{part}" for name in ("q", "k", "v", "do", "o", "dq", "dk", "dv") for part in ("batch", "head", "row")),
    *("dense_batch", "dense_head", "dense_row", "bias_batch", "bias_head", "bias_row"),
    *("threshold", "heads"),
]
"""Arguments whose values compile nothing anew. Strides of q, k, v and dout come in units of UNIT elements instead."""


def rows_of(t: Tensor) -> Tensor:
    """`t`, or a copy of it whose features lie side by side."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def strides_of(**tensors: Tensor) -> dict[str, int]:
    """UNIT, 8 where that divides all of them or else 1, and in its multiples the strides of batch, head and row."""
    strides = [t.stride() for t in tensors.values()]
    unit = 8
    for batch, head, row, _ in strides:
        if batch % 8 or head % 8 or row % 8:
            unit = 1
    found = {"UNIT": unit}
    for name, (batch, head, row, _) in zip(tensors, strides, strict=True):
        found[f"{name}_batch"], found[f"{name}_head"], found[f"{name}_row"] = batch // unit, head // unit, row // unit
    return found


def common_arguments(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores) -> dict[str, Any]:
    """Sizes, mask and scores. Absent tensors are None, which Triton compiles away."""
    batch, heads, queries, features = q.shape
    kv_heads, keys, v_features = k.shape[1], k.shape[2], v.shape[3]
    far = queries + keys
    capped, dropped = scores.softcap, scores.dropout > 0.0
    natural = q.dtype == torch.float32
    per_nat = 1.0 if natural else _LOG2E
    plain = capped is None and scores.relative is None and scores.bias is None and scores.scale > 0.0
    arguments: dict[str, Any] = {
        "queries": queries,
        "keys": keys,
        "kv_heads": kv_heads,
        "group": heads // kv_heads,
        "left": None if mask.left is None else max(-far, min(mask.left, far)),
        "right": None if mask.right is None else max(-far, min(mask.right, far)),
        "scale": scores.scale * per_nat if capped is None else scores.scale / capped,
        "softcap": None if capped is None else capped * per_nat,
        "seed_ptr": scores.seed if dropped else None,
        "threshold": keep_threshold(scores.dropout) if dropped else 0,
        "keep_scale": 1.0 / (1.0 - scores.dropout),
        "PLAIN": plain,
        "NATURAL": natural,
        "LOWER": mask.left is not None or mask.start is not None,
        "FEATURES": features,
        "V_FEATURES": v_features,
        "BLOCK_D": block_of(features),
        "BLOCK_V": block_of(v_features),
    }
    arguments |= _per_batch("start_ptr", "bounds_batch", mask.start)
    arguments["stop_ptr"] = None if mask.stop is None else mask.stop.contiguous()
    arguments |= _per_batch("padding_ptr", "padding_batch", None if mask.keys is None else mask.keys.view(torch.uint8))
    relative = None if scores.relative is None else in_copies(scores.relative)
    steps = (0, 0) if relative is None else (relative.stride(0) // UNIT, relative.stride(1) // UNIT)
    arguments |= {"relative_ptr": relative, "relative_head": steps[0], "relative_copy": steps[1]}
    shape = (batch, heads, queries, keys)
    arguments |= _broadcast("dense", None if mask.dense is None else mask.dense.view(torch.uint8), shape)
    arguments |= _broadcast("bias", scores.bias, shape)
    return arguments


def _per_batch(name: str, stride: str, t: Tensor | None) -> dict[str, Any]:
    """A tensor (batch or 1, n), and its step from batch entry to batch entry, 0 where there is one for all."""
    if t is None:
        return {name: None, stride: 0}
    return {name: t.contiguous(), stride: t.shape[1] if t.shape[0] > 1 else 0}


def _broadcast(name: str, t: Tensor | None, shape: tuple[int, ...]) -> dict[str, Any]:
    """The strides of what broadcasts to (batch, heads, queries, keys), in units of which rows of keys are whole ones.

    The unit is the 8 elements that one load may take where keys lie side by side, each row beginning aligned; else 1.
    """
    batch, head, row, column = (0, 0, 0, 0) if t is None else t.expand(shape).stride()
    unit = 8 if column == 1 and shape[3] % 8 == batch % 8 == head % 8 == row % 8 == 0 else 1
    return {
        f"{name}_ptr": t, f"{name}_batch": batch // unit, f"{name}_head": head // unit, f"{name}_row": row // unit,
        f"{name.upper()}_COLUMN": column, f"{name.upper()}_UNIT": unit,
    }  # fmt: skip
