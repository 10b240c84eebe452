"""Times of functions that compute the same, one after the other in every round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import quantiles

import torch

from ..common.gpu_clock import GpuClock

FEWEST, MOST = 7, 40
WARMUP = 2
PART = 0.02
"""A candidate must save so much of the time to be taken in another's place."""


def interleaved_us(
    functions: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Microseconds of each function in every round: in turn, in an order that is reversed every other round.

    A GPU's are those of `GpuClock`; a CPU's are those of the clock on the wall, because the work is done by several
    threads.

    Args:
        seconds: about how long to measure; between FEWEST and MOST rounds all the same, behind WARMUP others.
    """
    once_us = GpuClock().once_us if device.type == "cuda" else _wall_us
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    start, rounds, done = time.perf_counter(), FEWEST, 0
    while done < WARMUP + rounds:
        for name in names if done % 2 == 0 else reversed(names):
            samples[name].append(once_us(functions[name]))
        done += 1
        if done == WARMUP:
            each = (time.perf_counter() - start) / WARMUP
            rounds = max(FEWEST, min(MOST, int(seconds / max(each, 1e-9))))
    return {name: times[WARMUP:] for name, times in samples.items()}


def faster(times: list[float], than: list[float]) -> bool:
    """Whether a function was faster by more than the noise: by 2 percent in three of four rounds, at least.

    What disturbs a machine for a while disturbs both within a round, so the ratio within rounds is what counts.
    """
    ratios = [mine / theirs for mine, theirs in zip(times, than, strict=True)]
    return quantiles(ratios, n=4, method="inclusive")[2] < 1.0 - PART


def _wall_us(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e6 * (time.perf_counter() - start)
