"""What the Triton launchers of this family share: tile sizes and checks."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import next_power_of_2
from .form import Form, most_features

PARTIAL_SUMS = 512
"""Programs that sum up the weight's gradient, each over rows of its own: the same on every GPU, so that sums are."""

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Tile(NamedTuple):
    """Rows and columns of a program's tile, powers of two, and its warps."""

    block_rows: int
    block_columns: int
    num_warps: int


@lru_cache
def tile(features: int, norm_before_gate: bool | None = None, elements: int = 2048) -> Tile:
    """A whole row, and of short rows as many as make up `elements`: 16 elements a thread, 32 of the longest rows.

    With a gate 8, since more of each is held; 16 of the longest rows whose gate comes first, as of more warps each may
    have fewer registers.
    """
    block = next_power_of_2(max(features, 1))
    rows = max(1, elements // block)
    share = 512 if norm_before_gate is None else 256
    most = 16 if norm_before_gate is False else 32
    return Tile(rows, block, min(most, max(4, rows * block // share)))


def triton_type(dtype: torch.dtype | None) -> Any:
    """Triton's name of a dtype; fp32 for None."""
    return tl.float32 if dtype is None else _TYPES[dtype]


def check_launch(kernel: Any, x: Tensor, form: Form) -> None:
    """Raise ValueError unless `kernel` can be launched for x (rows, features)."""
    if isinstance(kernel, triton.JITFunction):
        if x.device.type != "cuda":
            raise ValueError(f"backend: expected CUDA tensors for 'triton', got tensors on {x.device}")
    elif x.dtype == torch.bfloat16:
        raise ValueError("backend: expected fp32 or fp16 in Triton's interpreter, which computes bfloat16 wrongly")
    features, most = x.shape[1] // form.groups, most_features(form)
    if features > most:
        raise ValueError(f"x: expected at most {most} features a group for 'triton', got {features}")
    if x.shape[0] >= 2**31:
        raise ValueError(f"x: expected fewer than 2**31 rows for 'triton', got {x.shape[0]}")
