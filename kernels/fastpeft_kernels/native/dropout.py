"""Counter-based dropout in C++."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .build import native_library

_FUNCTIONS = {torch.float32: "fastpeft_dropout_float32", torch.bfloat16: "fastpeft_dropout_bfloat16"}
_INT64 = ctypes.c_int64
_WORTH_A_THREAD = 1 << 15
"""Elements."""


def dropout_native(x: Tensor, out: Tensor, seed: int, stream: int, threshold: int, scale: float) -> bool:
    """Fill `out` with dropout of `x` as `common.random.dropout` defines it.

    Args:
        x, out: (rows, columns) on CPU, equal dtype, fp32 or bf16, rows contiguous in themselves.
        seed, stream, threshold, scale: as in `common.random`.

    Returns:
        False, with `out` untouched, when the library is not there or does not take these tensors.
    """
    function = _FUNCTIONS.get(x.dtype)
    library = native_library() if function is not None and x.stride(1) == 1 and out.stride(1) == 1 else None
    if library is None or function is None:
        return False
    rows, columns = x.shape
    call = getattr(library, function)
    call.restype = None
    call(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), _INT64(rows), _INT64(columns),
        _INT64(x.stride(0)), _INT64(out.stride(0)), _INT64(seed), _INT64(stream),
        ctypes.c_int32(threshold), ctypes.c_float(scale),
        ctypes.c_int(torch.get_num_threads() if x.numel() >= _WORTH_A_THREAD else 1),
    )  # fmt: skip
    return True
