"""Warm buffers for values that live for one product only.

On CPU a fresh large tensor costs a page fault for every 4 KiB, about as much as decoding into it; a buffer that is used
again costs nothing. On GPU the caching allocator does the same, so nothing is kept there.
"""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor

from .shapes import empty_for, kind_of

_LOCAL = threading.local()


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor that is valid until the same thread's next call with the same device and dtype.

    The buffer grows to the largest request. `release_scratch` frees it.
    """
    if kind_of(device) != "cpu":
        return empty_for("decoded weights", shape, dtype, device)
    buffers: dict[tuple[str, torch.dtype], Tensor] = _LOCAL.__dict__.setdefault("buffers", {})
    size = prod(shape)
    key = (device.type, dtype)
    buffer = buffers.get(key)
    if buffer is None or buffer.numel() < size:
        buffers.pop(key, None)
        with torch.inference_mode(False):
            buffer = torch.empty(size, dtype=dtype, device=device)
        buffers[key] = buffer
    return buffer[:size].view(shape)


def release_scratch() -> None:
    """Free this thread's buffers."""
    _LOCAL.__dict__.pop("buffers", None)
