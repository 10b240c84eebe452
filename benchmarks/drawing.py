"""What figures of trials share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastpeft.metrics.intervals import over_seeds


def intervals(axes: Any, columns: Sequence[str], ways: Mapping[str, Sequence[Sequence[float]]], label: str) -> None:
    """Means with their intervals over runs of other seeds: of each way, the runs' figures in each column."""
    for place, (way, given) in enumerate(ways.items()):
        found = [(x, over_seeds(values)) for x, values in enumerate(given) if values]
        at = [x + 0.15 * (place - (len(ways) - 1) / 2) for x, _ in found]
        means = [interval.value for _, interval in found]
        reach = [[i.value - i.low for _, i in found], [i.high - i.value for _, i in found]]
        axes.errorbar(at, means, yerr=reach, fmt="o", capsize=3, label=way.replace("`", ""))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel(label)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
