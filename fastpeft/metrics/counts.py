"""Precision, recall and F1 from counts: how often a class was right, guessed and true, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpeft.metrics.findings import Section

RIGHT, GUESSED, TRUE = range(3)
"""The last axis of counts, which are (rows, 3) over all classes or (rows, classes, 3)."""


def precision(counts: Any) -> float:
    """Share of what was guessed that is right; 0 where nothing was guessed."""
    right, guessed, _ = _sums(counts)
    return right / guessed if guessed else 0.0


def recall(counts: Any) -> float:
    """Share of what is true that was guessed; 0 where nothing is true."""
    right, _, true = _sums(counts)
    return right / true if true else 0.0


def f1_micro(counts: Any) -> float:
    """Harmonic mean of precision and recall over all classes together; 0 where nothing is guessed nor true."""
    right, guessed, true = _sums(counts)
    return 2 * right / (guessed + true) if guessed + true else 0.0


def f1_mean(counts: Any) -> float:
    """F1 averaged over the classes that occur; `counts` are (rows, classes, 3). 0 where none does."""
    import numpy as np

    by_class = np.asarray(counts).sum(axis=0)
    occur = by_class[:, GUESSED] + by_class[:, TRUE]
    scores = 2 * by_class[occur > 0, RIGHT] / occur[occur > 0]
    return float(scores.mean()) if len(scores) else 0.0


def by_class(title: str, names: Sequence[str], counts: Any) -> Section:
    """A table with a line for each class; `counts` are (rows, classes, 3)."""
    import numpy as np

    arrays = np.asarray(counts)
    lines = ["| | precision | recall | F1 | true |", "|---|---|---|---|---|"]
    for number, name in enumerate(names):
        own = arrays[:, number]
        figures = " | ".join(f"{of(own):.4g}" for of in (precision, recall, f1_micro))
        lines.append(f"| {name} | {figures} | {own[:, TRUE].sum()} |")
    return Section(title, "\n".join(lines))


def _sums(counts: Any) -> tuple[float, float, float]:
    import numpy as np

    right, guessed, true = np.asarray(counts).reshape(-1, 3).sum(axis=0).tolist()
    return right, guessed, true
