"""The clock of checks on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor


def median_us(function: Callable[[], object]) -> float:
    """Median microseconds of 20 calls, each with the second-level cache emptied and the host ahead of the device."""
    room = flush_room()
    return median([once_us(function, room) for _ in range(25)][5:])


def flush_room() -> Tensor:
    """Memory for `once_us` to write over: more than any second-level cache holds."""
    return torch.empty(256 << 20, dtype=torch.uint8, device="cuda")


def once_us(function: Callable[[], object], room: Tensor) -> float:
    """Microseconds of one call on the current GPU, likewise."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    room.zero_()
    room.zero_()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)
