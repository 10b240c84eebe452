"""Classes: their names, in the order of their numbers."""

from __future__ import annotations

from typing import Any

from fastpeft.errors import UserError

from .chat import short

MOST = 1000
"""More than these are hardly classes."""


def named_labels(rows: Any) -> Any:
    """Rows with the column `label` as names, where `datasets` keeps numbers and names apart."""
    names = getattr(rows.features["label"], "names", None)
    if names is None:
        return rows
    plain = [None if number is None or number < 0 else names[number] for number in rows["label"]]
    return rows.remove_columns("label").add_column("label", plain)


def find_labels(rows: Any) -> list[str]:
    """All classes in the column `label`: numbers in their order, names in the alphabet's or as `datasets` numbers them.

    Raises:
        UserError: a row without, a label that is neither text nor a whole number, fewer than two, or over MOST.
    """
    given = rows["label"]
    for number, value in enumerate(given, 1):
        if not isinstance(value, (str, int)):
            where = f"data: row {number}, column label"
            raise UserError(f"{where}: expected a class as text or whole number, got {short(value)}")
    values = set(given)
    names = getattr(rows.features["label"], "names", None)
    if not 2 <= len(values) <= MOST:
        got = f"one: {next(iter(values))!r}" if len(values) == 1 else str(len(values))
        raise UserError(f"data: expected 2 to {MOST} classes in column label, got {got}")
    if names is not None:
        return list(names)
    if all(isinstance(value, int) for value in values):
        return [str(value) for value in sorted(values)]
    return sorted(str(value) for value in values)


def check_labels(labels: list[str]) -> None:
    """Raise UserError for fewer than two names of classes, or one that comes twice."""
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if len(labels) < 2 or twice is not None:
        got = f"{twice!r} twice" if twice is not None else str(labels)
        raise UserError(f"data.labels: expected at least two names, each once, got {got}")
