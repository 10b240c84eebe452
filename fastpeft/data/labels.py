"""Classes: their names, in the order of their numbers; or that labels are numbers themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fastpeft.config import DataSection
from fastpeft.errors import UserError

from .chat import short

MOST = 1000
"""More than these are hardly classes."""
SINGLE, SEVERAL, NUMBERS = "single_label_classification", "multi_label_classification", "regression"
"""transformers' values of problem_type."""
COLUMN = {"sequence-classification": "label", "token-classification": "tags"}
"""Where the classes of a task are."""


def resolve_labels(task: str, data: DataSection, rows: Any, evaluation: Any) -> tuple[DataSection, Any, Any]:
    """(data with problem_type and labels filled in, rows and evaluation with classes as names).

    Raises:
        UserError: labels that the problem has not, or as find_labels and check_labels.
    """
    if data.problem_type is not None and task != "sequence-classification":
        raise UserError(f"data.problem_type: expected null for task {task}, got {data.problem_type!r}")
    if task not in COLUMN:
        return data, rows, evaluation
    column = COLUMN[task]
    if column == "label":
        data = replace(data, problem_type=data.problem_type or problem_of(rows))  # type: ignore[arg-type]
    if data.problem_type == NUMBERS:
        if data.labels is not None:
            raise UserError(f"data.labels: expected null for data.problem_type {NUMBERS}, got {data.labels}")
        return data, rows, evaluation
    several = column == "tags" or data.problem_type == SEVERAL
    labels = find_labels(rows, column, several=several) if data.labels is None else data.labels
    check_labels(labels)
    return (
        replace(data, labels=labels),
        named_labels(rows, column),
        None if evaluation is None else named_labels(evaluation, column),
    )


def problem_of(rows: Any) -> str:
    """What the column `label` asks for: lists are several classes a row, fractions numbers to learn, else a class."""
    feature = rows.features["label"]
    if isinstance(feature, list) or hasattr(feature, "feature"):
        return SEVERAL
    floating = str(getattr(feature, "dtype", "")).startswith(("float", "double"))
    if floating and any(value is not None and value != int(value) for value in rows["label"]):
        return NUMBERS
    return SINGLE


def named_labels(rows: Any, column: str = "label") -> Any:
    """Rows with the classes of a column as names, where `datasets` keeps numbers and names apart."""
    names = _kept_apart(rows.features[column])
    if names is None:
        return rows

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(each) for each in value]
        return None if value is None or value < 0 else names[value]

    plain = [named(value) for value in rows[column]]
    return rows.remove_columns(column).add_column(column, plain)


def _kept_apart(feature: Any) -> list[str] | None:
    """Names of a ClassLabel, or of a list of them; None where the column holds something else."""
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    names: list[str] | None = getattr(inner, "names", None)
    return names


def find_labels(rows: Any, column: str = "label", *, several: bool = False) -> list[str]:
    """All classes in a column: numbers in their order, names in the alphabet's or as `datasets` numbers them.

    Args:
        several: whether a row has a list of them.

    Raises:
        UserError: a row without, a label that is neither text nor a whole number, fewer than two, or over MOST.
    """
    values = set()
    for number, value in _each(rows[column], several):
        if not isinstance(value, (str, int)):
            where = f"data: row {number}, column {column}"
            hint = f"; data.problem_type {NUMBERS} learns numbers" if isinstance(value, float) else ""
            raise UserError(f"{where}: expected a class as text or whole number, got {short(value)}{hint}")
        values.add(value)
    names = _kept_apart(rows.features[column])
    if not 2 <= len(values) <= MOST:
        got = f"one: {next(iter(values))!r}" if len(values) == 1 else str(len(values))
        raise UserError(f"data: expected 2 to {MOST} classes in column {column}, got {got}")
    if names is not None:
        return list(names)
    if all(isinstance(value, int) for value in values):
        return [str(value) for value in sorted(values)]
    return sorted(str(value) for value in values)


def _each(given: Any, several: bool) -> Iterator[tuple[int, Any]]:
    """(row, class), also of rows with several."""
    for number, value in enumerate(given, 1):
        for one in value if several and isinstance(value, list) else [value]:
            yield number, one


def check_labels(labels: list[str]) -> None:
    """Raise UserError for fewer than two names of classes, or one that comes twice."""
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if len(labels) < 2 or twice is not None:
        got = f"{twice!r} twice" if twice is not None else str(labels)
        raise UserError(f"data.labels: expected at least two names, each once, got {got}")
