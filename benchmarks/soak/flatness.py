"""Whether a figure of a process that goes on and on stays what it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fastpeft.metrics.intervals import Interval
from fastpeft.requirements import require

ALLOWED = {
    "resident_kib": 2048.0,
    "heap_kib": 256.0,
    "blocks": 500.0,
    "objects": 100.0,
    "tensors": 0.5,
    "hooks": 0.5,
    "registered": 5.0,
    "descriptors": 0.5,
    "threads": 0.5,
    "cache_kib": 0.5,
}
"""By how much a figure may surely grow over the second half of a work, whatever the number of its units."""


class Growth(NamedTuple):
    """Of a figure over the second half of its samples: by how much, with a 95 % interval, and whether that is flat."""

    name: str
    interval: Interval
    flat: bool


def growth(name: str, values: Sequence[float]) -> Growth:
    """Slope of the straight line through the second half of the values, times the time between first and last of them.

    Flat is what does not surely grow by more than is allowed: the lower end of Student's interval of the slope counts.
    The first half is left to what is made once, and to caches that fill.

    Args:
        name: of `ALLOWED`.
        values: at equal distances of time, at least 8.

    Raises:
        ValueError: fewer values.
    """
    if len(values) < 8:
        raise ValueError(f"values: expected at least 8, got {len(values)}")
    stats = require("train", "scipy.stats", "the interval of a slope")
    late = list(values[len(values) // 2 :])
    time, mean = len(late) - 1, math.fsum(late) / len(late)
    places = [place - time / 2 for place in range(len(late))]
    squares = math.fsum(place**2 for place in places)
    slope = math.fsum(place * value for place, value in zip(places, late, strict=True)) / squares
    left = math.fsum((value - mean - slope * place) ** 2 for place, value in zip(places, late, strict=True))
    reach = float(stats.t.ppf(0.975, len(late) - 2)) * math.sqrt(left / (len(late) - 2) / squares)
    found = Interval(time * slope, time * (slope - reach), time * (slope + reach))
    return Growth(name, found, found.low <= ALLOWED[name])
