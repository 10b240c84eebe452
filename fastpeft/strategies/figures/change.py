"""What training changed, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fastpeft.metrics.findings import Metric
from fastpeft.metrics.intervals import over_rows

BEFORE = "before training"


def change(
    name: str,
    statistic: Callable[..., float],
    before: tuple[Any, ...],
    after: tuple[Any, ...],
    better: Literal["higher", "lower"] = "higher",
) -> Metric:
    """How much a figure changed. The same rows are drawn for both, so what rows have in common is not in its interval.

    Args:
        name: of the figure.
        statistic: called with `before`, and with `after`: columns of as many rows each.
    """
    count = len(before)

    def difference(*columns: Any) -> float:
        return statistic(*columns[count:]) - statistic(*columns[:count])

    interval = over_rows(difference, *before, *after)
    return Metric(f"{name}: change by training", *interval, len(after[0]), 0.0, "no change", better)
