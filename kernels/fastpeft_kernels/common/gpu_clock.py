"""The clock of checks and measurements on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

_LEAST, _MOST = 2, 64


class GpuClock:
    """Microseconds of calls on the current GPU, with the second-level cache emptied before each.

    Before a call the device is given other work, memory to fill, so that the host can be done with the call before the
    device begins with it; then what is measured is the device's own time. Where the host was not done in time, the call
    is measured again behind twice the work, and the more is kept for all later calls. A call that waits for the device,
    or that takes the host longer than 64 fills, is measured with the host's time included.
    """

    def __init__(self) -> None:
        self._room = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # more than any second-level cache holds
        self._fills = _LEAST

    def once_us(self, function: Callable[[], object], prepare: Callable[[], object] | None = None) -> float:
        """Microseconds of one call; `function` runs once or more, each time after `prepare`, which is not measured."""
        while True:
            if prepare is not None:
                prepare()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(self._fills):
                self._room.zero_()
            begin.record()
            function()
            end.record()
            late = begin.query()  # the device is there already
            end.synchronize()
            if not late or self._fills >= _MOST:
                return 1e3 * begin.elapsed_time(end)
            self._fills *= 2


def median_us(function: Callable[[], object]) -> float:
    """Median microseconds of 20 calls by a `GpuClock`, after five others."""
    function()  # compiles, which no fill covers
    clock = GpuClock()
    return median([clock.once_us(function) for _ in range(25)][5:])
