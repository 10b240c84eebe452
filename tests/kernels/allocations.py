"""What a call allocates on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def largest(function: Callable[[], Any]) -> int:
    """The bytes that the one operator of a call that allocates most, frees included, holds more than before."""
    return max(event.cpu_memory_usage for event in _events(function))


def as_large_as(size: int, function: Callable[[], Any]) -> int:
    """How many operators of a call allocate so many bytes or more themselves."""
    return sum(event.self_cpu_memory_usage >= size for event in _events(function))


def _events(function: Callable[[], Any]) -> Any:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return profile.events()
