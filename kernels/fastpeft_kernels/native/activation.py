"""Gated activations in C++."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .build import native_function, native_library

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_INT, _INT64, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_Arguments = tuple[type[Any], ...]
_MATRIX: _Arguments = (_POINTER, _INT64)
_FORWARD: _Arguments = (_INT, *_MATRIX * 3, _INT64, _INT64, _INT)
_BACKWARD: _Arguments = (_INT, *_MATRIX * 6, _INT64, _INT64, _INT)
# Elements from which a second thread is worth waking.
_WORTH_A_THREAD = 1 << 15


def activation_refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the C++ cannot take tensors of this device and dtype here; None when it can."""
    if device.type != "cpu":
        return f"takes CPU tensors, got tensors on {device}"
    if dtype not in _NAMES:
        return f"takes fp32, fp16 and bf16, got {dtype}"
    return "could not be built here" if native_library() is None else None


def gated_activation_native(gate: Tensor | None, up: Tensor, kind: int, h: Tensor) -> None:
    """Fill `h` with act(gate) * up, or act(up); tensors as `activation.api` checked them, `kind` an index there."""
    _call("fastpeft_gated_activation_", _FORWARD, kind, (gate, up, h), up)


def gated_activation_backward_native(
    dh: Tensor, gate: Tensor | None, up: Tensor, kind: int, dgate: Tensor | None, dup: Tensor, h: Tensor | None
) -> None:
    """Fill `dgate`, `dup` and `h`; tensors as `activation.api` has checked them, `kind` its index there."""
    _call("fastpeft_gated_activation_backward_", _BACKWARD, kind, (dh, gate, up, dgate, dup, h), up)


def _call(name: str, arguments: _Arguments, kind: int, matrices: Sequence[Tensor | None], like: Tensor) -> None:
    rows, columns = like.shape
    elements = rows * columns
    if all(matrix is None or matrix.is_contiguous() for matrix in matrices):
        rows, columns = 1, elements
    places: list[int | None] = []
    for matrix in matrices:
        places += (None, 0) if matrix is None else (matrix.data_ptr(), matrix.stride(0))
    threads = torch.get_num_threads() if elements >= _WORTH_A_THREAD else 1
    native_function(native_library(), name + _NAMES[like.dtype], arguments)(kind, *places, rows, columns, threads)
