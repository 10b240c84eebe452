"""95 % intervals: over the rows of one evaluation, and over runs that differ in their seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastpeft.requirements import require

RESAMPLES = 1000


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def over_rows(statistic: Callable[..., float], *columns: Any, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The percentile bootstrap: what `statistic` is on rows drawn anew, with replacement, as many as there are.

    It says what other rows of the same kind would have given, not what another training would have.

    Args:
        statistic: called with as many arrays as `columns`, rows first.
        columns: arrays or lists of the same length, of at least one row.

    Raises:
        ValueError: no rows, or columns of different lengths.
    """
    import numpy as np

    arrays = [np.asarray(column) for column in columns]
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"columns: expected the same number of rows in each, at least one, got {sorted(lengths)}")
    count, generator = lengths.pop(), np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        drawn = generator.integers(0, count, count)
        values.append(statistic(*(array[drawn] for array in arrays)))
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(float(statistic(*arrays)), float(low), float(high))


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean and Student's interval over runs that differ in their seed; infinite for a single one.

    Raises:
        ValueError: no values.
    """
    count = len(values)
    if count == 0:
        raise ValueError("values: expected at least one, got none")
    stats = require("train", "scipy.stats", "an interval over seeds")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, -math.inf, math.inf)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stats.t.ppf(0.975, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half)
