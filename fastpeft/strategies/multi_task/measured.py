"""A task's result by row, so that two ways of training it can be compared row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastpeft.metrics.classification import accuracy
from fastpeft.metrics.findings import Metric
from fastpeft.metrics.intervals import Interval, over_rows
from fastpeft.training.evaluating import classes, token_losses
from fastpeft.training.preparing import Prepared

Measured = list[list[float]]
"""Columns of a figure, rows first; plain numbers."""


def measure(prepared: Prepared, trainer: Any) -> Measured:
    """Of the evaluation's rows: the true and the likeliest class, or the loss and how many tokens it is over."""
    assert prepared.evaluation is not None
    if prepared.config.model.task == "sequence-classification":
        return [list(prepared.evaluation.rows["labels"]), classes(prepared, trainer, prepared.evaluation)]
    losses = token_losses(prepared, trainer, prepared.evaluation)
    return [losses.sums.tolist(), losses.tokens.tolist()]


def of_same_rows(prepared: Prepared, one: Measured, other: Measured) -> bool:
    """Whether two were measured on the same rows, as far as the columns tell that no model has a say in."""
    given = 0 if prepared.config.model.task == "sequence-classification" else 1
    return [len(column) for column in one] == [len(column) for column in other] and one[given] == other[given]


def figure(prepared: Prepared) -> tuple[str, Any, Any]:
    """(name, function of the columns, which way is better)."""
    if prepared.config.model.task == "sequence-classification":
        return "accuracy", accuracy, "higher"
    return "loss per token", _ratio, "lower"


def value(prepared: Prepared, columns: Measured) -> float:
    """The figure of all rows."""
    return float(figure(prepared)[1](*columns))


def difference(name: str, prepared: Prepared, before: Measured, after: Measured, against: str) -> Metric:
    """How much better or worse `after` is than `before`, on the same rows.

    Args:
        name: of the task and what is compared.
        against: what `before` is.
    """
    of, statistic, better = figure(prepared)
    count = len(before)

    def change(*columns: Sequence[float]) -> float:
        return float(statistic(*columns[count:]) - statistic(*columns[:count]))

    found: Interval = over_rows(change, *before, *after)
    return Metric(f"{name}: {of}, difference", *found, len(after[0]), 0.0, against, better)


def verdict(metric: Metric) -> str:
    """What the interval of a difference allows to say."""
    assert metric.low is not None and metric.high is not None
    if metric.low <= 0 <= metric.high:
        return "not told apart"
    return "better" if (metric.low > 0) == (metric.better == "higher") else "worse"


def _ratio(sums: Any, counts: Any) -> float:
    return float(np.sum(sums) / max(1, np.sum(counts)))
