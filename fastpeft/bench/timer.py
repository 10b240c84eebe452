"""Round-robin timing: everything that is compared is measured in every round, so that a busy or throttled machine
disturbs all alike, and ratios are taken within a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch

from .reading import median_ratio

Step = Callable[[], object]


def interleaved(
    steps: Mapping[str, Step],
    rounds: int,
    warmup: int = 2,
    device: str = "cpu",
    clock: Callable[[Step], float] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every step in every round.

    Args:
        steps: by name; called in turn, in an order that is reversed every other round.
        rounds: how many samples of each.
        warmup: rounds before, not counted.
        device: "cuda" waits for the GPU before each reading of the clock.
        clock: gives the milliseconds of one call; the wall's by default.

    Returns:
        `rounds` samples for each name, in order, so that index i belongs to round i everywhere.
    """
    clock = clock or partial(wall_ms, device=device)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(warmup + rounds):
        for name in list(steps) if index % 2 == 0 else reversed(list(steps)):
            milliseconds = clock(steps[name])
            if index >= warmup:
                samples[name].append(milliseconds)
    return samples


def device_clock(device: str) -> Callable[[Step], float]:
    """Milliseconds of one call: on a GPU its own time, the host's hidden behind work queued before; else the wall's.

    A step with a method `prepare` has it called before, unmeasured.
    """
    if device != "cuda":

        def wall(step: Step) -> float:
            _prepare(step)
            return wall_ms(step)

        return wall
    from fastpeft_kernels.common.gpu_clock import GpuClock

    clock = GpuClock()
    return lambda step: clock.once_us(step, partial(_prepare, step)) / 1e3


def _prepare(step: Step) -> None:
    getattr(step, "prepare", lambda: None)()


def wall_ms(step: Step, device: str = "cpu") -> float:
    """Milliseconds of one call, with the host's time; "cuda" waits for the GPU before each reading of the clock."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return (time.perf_counter() - start) * 1e3


def ratio(samples: Mapping[str, list[float]], of: str, to: str) -> float:
    """Median over rounds of the time of one step divided by the time of another."""
    return median_ratio(samples[of], samples[to])
