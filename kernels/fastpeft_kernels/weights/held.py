"""Decoded weights that wait for a second product: those of a layer that is computed again right before its backward.

Recomputation and backward of one layer run in the same thread, on the same stream. What recomputation decodes is kept,
as far as there is room, and let go by the product of backward that reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import Tensor

from .base import FrozenWeight

_Key = tuple[object, ...]
_LOCAL = threading.local()


class _Held:
    def __init__(self, room: int) -> None:
        self.room, self.filling = room, True
        self.tensors: dict[_Key, Tensor] = {}
        _ALL.add(self)


_ALL: WeakSet[_Held] = WeakSet()


@contextmanager
def holding(room: int) -> Iterator[None]:
    """To be called in a backward pass, around a layer's recomputation; what is left of another layer's goes.

    Args:
        room: bytes of decoded weights that may wait at a time; the first that fit do.
    """
    if (other := getattr(_LOCAL, "held", None)) is not None:
        other.tensors.clear()
    _LOCAL.held = held = _Held(room)
    # what backward never reads, such as weights before which nothing is trained
    torch.autograd.Variable._execution_engine.queue_callback(held.tensors.clear)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        held.filling = False


def held(weight: FrozenWeight, dtype: torch.dtype) -> Tensor | None:
    """The values, to be read by one product, where they wait or now do; None where the caller is to decode them."""
    found: _Held | None = getattr(_LOCAL, "held", None)
    if found is None or not (found.filling or found.tensors):
        return None
    key = (weight.stamp(), weight.shape, dtype)
    if not found.filling:
        return found.tensors.pop(key, None)
    if key not in found.tensors:
        size = weight.shape[0] * weight.shape[1] * dtype.itemsize
        if size > found.room:
            return None
        found.room -= size
        found.tensors[key] = weight.decode(dtype=dtype)
    return found.tensors[key]


def release_held() -> None:
    """Let go of all that waits, in every thread: for after a backward pass that failed."""
    for found in list(_ALL):
        found.tensors.clear()
