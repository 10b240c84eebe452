"""How long a GPU is busy for a step, and how much it is told: beside the step's wall time, what the host costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch


class Busy(NamedTuple):
    """Of a step: milliseconds that the GPU computes and copies, one after the other; kernels that are launched."""

    ms: float
    launches: float


def busy(step: Callable[[], object], steps: int = 3) -> Busy:
    """By torch's profiler, which itself slows the host down; a mean over so many steps on the current GPU."""
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    found = counted(profiler.profiler.kineto_results.events())
    return Busy(found.ms / steps, found.launches / steps)


def keep(add: Callable[..., object], found: Mapping[str, Busy]) -> None:
    """Record what was found for each peer; `add` takes the fields of a record that are missing here."""
    for peer, each in found.items():
        add(peer=peer, metric="busy", unit="ms", samples=each.ms)
        add(peer=peer, metric="launches", unit="1", samples=each.launches)


def counted(events: Iterable[Any]) -> Busy:
    """Of a profiler's events. Ranges that somebody named are shown on the GPU too, and hold what is counted anyway."""
    ms, launches = 0.0, 0
    for event in events:
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            ms += 0.0 if event.is_user_annotation() else event.duration_ns() / 1e6
        elif "LaunchKernel" in event.name():
            launches += 1
    return Busy(ms, launches)
