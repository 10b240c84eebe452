"""Numbers of a device, read on the host once they are there, without waiting for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class _Reading(NamedTuple):
    value: Tensor
    ready: torch.cuda.Event | None
    use: Callable[[Tensor], object]


class Readings:
    """In the order in which they were asked for."""

    def __init__(self) -> None:
        self._waiting: deque[_Reading] = deque()

    def ask(self, value: Tensor, use: Callable[[Tensor], object]) -> None:
        """Have `use` called with a copy on the host, by a later `read`."""
        ready = None
        host = value.to("cpu", non_blocking=True)  # of a GPU into pinned memory
        if value.is_cuda:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(value.device))
        self._waiting.append(_Reading(host, ready, use))

    def read(self, *, wait: bool = False) -> None:
        """Use what has come; with `wait`, all."""
        while self._waiting and (wait or self._waiting[0].ready is None or self._waiting[0].ready.query()):
            reading = self._waiting.popleft()
            if reading.ready is not None:
                reading.ready.synchronize()
            reading.use(reading.value)


def can_read() -> bool:
    """Not while a graph is made of what runs: it would be asked for once, and never again."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
