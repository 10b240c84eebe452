"""What a call allocates on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def largest(function: Callable[[], Any]) -> int:
    """The bytes that the one operator of a call that allocates most, frees included, holds more than before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(event.cpu_memory_usage for event in profile.events())
