"""A classifier's figures for each group of people or texts, where an average hides whom it fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastpeft.metrics.classification import f1_macro

FEW = 30
"""Fewer rows than this say little about a group."""


@dataclass(frozen=True)
class Group:
    """One group.

    Attributes:
        name: value of the column.
        rows: how many.
        accuracy: share of right answers.
        low, high: Wilson's 95 % interval of the accuracy.
        f1_macro: F1 averaged over the classes that occur.
        predicted: share of each class among the answers.
    """

    name: str
    rows: int
    accuracy: float
    low: float
    high: float
    f1_macro: float
    predicted: dict[str, float]


@dataclass(frozen=True)
class Groups:
    """All groups, the least accurate first."""

    column: str
    groups: tuple[Group, ...]

    @property
    def gap(self) -> float:
        """Accuracy of the best group less that of the worst."""
        return self.groups[-1].accuracy - self.groups[0].accuracy

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"gap": self.gap}

    def __str__(self) -> str:
        width = max(len(self.column), *(len(group.name) for group in self.groups))
        lines = [f"{self.column:{width}}  {'rows':>6}  {'accuracy':>8}  {'95 % interval':>15}  {'F1':>6}  predicted"]
        for group in self.groups:
            interval = f"{group.low:.3f} to {group.high:.3f}"
            shares = ", ".join(f"{label} {share:.0%}" for label, share in group.predicted.items())
            few = f"  (fewer than {FEW} rows)" if group.rows < FEW else ""
            lines.append(
                f"{group.name:{width}}  {group.rows:>6}  {group.accuracy:>8.3f}  {interval:>15}  "
                f"{group.f1_macro:>6.3f}  {shares}{few}"
            )
        return "\n".join([*lines, f"largest gap in accuracy: {self.gap:.3f}"])


def by_group(names: Sequence[str], true: Sequence[str], guessed: Sequence[str], column: str) -> Groups:
    """Figures for each group.

    Args:
        names: of the group that each row belongs to.
        true, guessed: labels, as long as `names`.
        column: what the groups are groups of.

    Raises:
        ValueError: not equally long, or empty.
    """
    if not names or not len(names) == len(true) == len(guessed):
        raise ValueError(f"guessed: expected {len(names)} labels and more than none, got {len(guessed)}")
    found = []
    for name in sorted(set(names)):
        pairs = [(t, g) for n, t, g in zip(names, true, guessed, strict=True) if n == name]
        found.append(_group(name, pairs, sorted({*true, *guessed})))
    return Groups(column, tuple(sorted(found, key=lambda group: group.accuracy)))


def _group(name: str, pairs: list[tuple[str, str]], labels: list[str]) -> Group:
    count = len(pairs)
    accuracy = sum(true == guessed for true, guessed in pairs) / count
    low, high = wilson(accuracy, count)
    shares = {label: sum(guessed == label for _, guessed in pairs) / count for label in labels}
    return Group(name, count, accuracy, low, high, f1_macro(*zip(*pairs, strict=True)), shares)


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share that was seen in `count` trials (Wilson, 1927)."""
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
