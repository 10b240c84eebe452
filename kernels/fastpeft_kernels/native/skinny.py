"""Products of a large matrix with matrices of rank width, in C++: see skinny.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from .build import native_library

LARGEST_RANK = 32
"""Beyond it BLAS is faster for some sizes; see lora/rank_products.py."""
SMALLEST = 1 << 14
"""Elements of y below which a call costs more than it saves."""
_WORTH_A_THREAD = 1 << 16
_INT, _INT64, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_PLAIN = (Tensor, torch.nn.Parameter)


def skinny_serves(y: Tensor, *others: Tensor) -> bool:
    """Whether `skinny` takes y (tokens, features) with matrices (any, rank), and is faster than BLAS."""
    return (
        y.device.type == "cpu"
        and y.numel() >= SMALLEST
        and y.stride(1) == 1
        and 1 <= others[0].shape[1] <= LARGEST_RANK
        and all([t.dtype == torch.float32 and type(t) in _PLAIN for t in (y, *others)])
        and not torch._C._are_functorch_transforms_active()  # tensors under vmap have no memory of their own
        and native_library() is not None
    )


def skinny(
    y: Tensor, *, b: Tensor | None = None, ds: Tensor | None = None, s: Tensor | None = None, db: Tensor | None = None
) -> None:
    """Fill ds = y b and db = y^T s, either or both, from one read of y.

    Args:
        y: (tokens, features) fp32, its columns contiguous.
        b, db: (features, rank) fp32, any strides.
        s, ds: (tokens, rank) fp32, any strides.
    """
    places: list[int | None] = []
    for matrix in (b, ds, s, db):
        places += (None, 0, 0) if matrix is None else (matrix.data_ptr(), *matrix.stride())
    tokens, features = y.shape
    rank = next(t.shape[1] for t in (b, s) if t is not None)
    # Each thread has a db of its own, and adding them up must cost less than reading y.
    threads = max(1, min(torch.get_num_threads(), y.numel() // _WORTH_A_THREAD, tokens // (4 * rank)))
    size, run = _functions()
    memory = torch.empty(size(features, rank, b is not None, s is not None, threads), dtype=torch.float32, device="cpu")
    run(y.data_ptr(), y.stride(0), tokens, features, rank, *places, memory.data_ptr(), threads)


@cache
def _functions() -> tuple[Callable[..., int], Callable[..., None]]:
    size, run = cast(Any, native_library()).fastpeft_skinny_memory, cast(Any, native_library()).fastpeft_skinny
    size.argtypes, size.restype = [_INT64, _INT64, _INT, _INT, _INT], _INT64
    run.argtypes = [_POINTER, *[_INT64] * 4, *[_POINTER, _INT64, _INT64] * 4, _POINTER, _INT]
    run.restype = None
    return size, run
