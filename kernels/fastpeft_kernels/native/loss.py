"""The steps of a fused loss in C++."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .build import native_function, native_library

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_INT, _INT64, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_Arguments = tuple[type[Any], ...]
_RAW: _Arguments = (_POINTER, *[_INT64] * 4, *[_POINTER] * 2, *[_FLOAT] * 2, _POINTER)
_ONLINE: _Arguments = (*_RAW, _FLOAT, *[_POINTER] * 6, _INT)
_GRADIENT: _Arguments = (*_RAW, *[_POINTER] * 6, _INT)
_WORTH_A_THREAD = 1 << 15
"""Logits."""


class Chunk:
    """Raw logits and what `loss.steps` takes along with them; dtypes as there, but fp64."""

    def __init__(
        self,
        raw: Tensor,
        first: int,
        labels: Tensor,
        bias: Tensor | None,
        scale: float,
        softcap: float | None,
        class_weight: Tensor | None,
    ) -> None:
        self.raw, self._first, self._labels = raw, first, labels.contiguous()
        self._bias, self._classes = _fp32(bias), _fp32(class_weight)
        self._threads = torch.get_num_threads() if raw.numel() >= _WORTH_A_THREAD else 1
        self._factor, self._cap = (scale, 0.0) if softcap is None else (scale / softcap, softcap)

    def online(
        self, slack: float, top: Tensor, others: Tensor, label: Tensor, factor: Tensor, total: Tensor | None
    ) -> None:
        """`online_step` with `write`; the last five, (tokens,) fp32 and contiguous, are filled in place."""
        raw, rooms = self.raw, None
        if raw.dtype != torch.float32:  # a row of logits for each thread
            rooms = raw.new_empty((self._threads, raw.shape[1]), dtype=torch.float32)
        self._call("online", _ONLINE, slack, *map(_place, (top, others, label, factor, total, rooms)))

    def gradient(self, *known: Tensor | None) -> None:
        """`gradient_step` with top, inverse, others, d_nll, d_lse and d_total, (tokens,) each."""
        given = [_fp32(x) for x in known]
        self._call("gradient", _GRADIENT, *map(_place, given))

    def _call(self, name: str, arguments: _Arguments, *more: Any) -> None:
        raw = self.raw
        run = native_function(native_library(), f"fastpeft_loss_{name}_{_NAMES[raw.dtype]}", arguments)
        labels, bias, classes = map(_place, (self._labels, self._bias, self._classes))
        place = (raw.data_ptr(), raw.stride(0), *raw.shape, self._first, labels, bias)
        run(*place, self._factor, self._cap, classes, *more, self._threads)


def loss_steps_native(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `Chunk` takes raw logits of this device and dtype here."""
    return device.type == "cpu" and dtype in _NAMES and native_library() is not None


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _place(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
