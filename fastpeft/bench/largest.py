"""The largest size of a step that fits into a given memory: tried on a GPU, or predicted from smaller ones."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence

import torch

from .report.growth import fit

CLOSE = 1.05  # how far apart the largest size that fits and the smallest that does not may stay


def predicted(points: Sequence[tuple[float, float]], memory: float) -> int:
    """The size at which the peak would reach `memory`.

    It is taken to grow on from the last of `points` in proportion, or where it grew by a higher power between two of
    them, by that: parts that do not grow make a fitted power too small.

    Args:
        points: (size, bytes), three of them at least.
        memory: bytes.

    Raises:
        ValueError: too few points, or one with no peak.
    """
    found = fit(points)
    if found is None:
        raise ValueError(f"points: expected three sizes at least, with peaks above 0, got {list(points)}")
    size, peak = max(points)
    return math.floor(size * (memory / peak) ** (1 / max(1.0, found.most)))


def largest(fits: Callable[[int], bool], first: int, most: int) -> int:
    """The largest size that fits, to within CLOSE: doubled until one does not, then halved between the two.

    Args:
        fits: of a size; whatever is smaller than one that fits is taken to fit.
        first: tried first.
        most: no size beyond it is tried.

    Returns:
        0 where `first` does not fit.
    """
    good, bad = 0, first
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    if not good:
        return 0
    bad = min(bad, most + 1)
    while bad - good > 1 and bad > CLOSE * good:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def fits_on_gpu(step: Callable[[], object], memory: float) -> bool:
    """Whether the current GPU can run the step with `memory` bytes of torch's allocator beside what lies there."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    allowed = torch.cuda.memory_reserved() + memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    try:
        step()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True
