"""Rows to evaluate on that are trained on too, among data sets as trainers take them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from fastpeft.data.checks import leak_note

MOST = 100_000
"""Rows of each side that are compared."""


def leak(training: Any, evaluation: Any) -> str | None:
    """In words: so many rows are in both; None where none is, or where rows cannot be compared.

    Rows are the same where all is but single numbers, such as classes and row numbers. Compared are `datasets.Dataset`s
    and lists of mappings: other data sets may make a row anew each time that they are asked.

    Args:
        training: data set.
        evaluation: data set, or several by name.
    """
    if isinstance(evaluation, Mapping):
        each = ((name, leak(training, one)) for name, one in evaluation.items())
        return next((f"{name}: {words}" for name, words in each if words is not None), None)
    if not (_is_table(training) and _is_table(evaluation)):
        return None
    trained = set(_keys(training)) - {None}
    found = [number for number, key in enumerate(_keys(evaluation), 1) if key in trained]
    return leak_note(found, len(evaluation)) if found else None


def _is_table(rows: Any) -> bool:
    plain = isinstance(rows, (list, tuple)) and all(isinstance(row, Mapping) for row in rows[:1])
    columns: Any = getattr(rows, "features", None)
    if columns is None or not hasattr(rows, "with_format") or not hasattr(rows, "__len__"):
        return plain
    return not any(hasattr(column, "decode_example") for column in columns.values())  # pictures take long to be read


def _keys(rows: Any) -> Iterator[bytes | None]:
    """What each row is told by; None where there is nothing."""
    plain = rows if isinstance(rows, (list, tuple)) else rows.with_format(None)
    return (_key(row) for row in islice(plain, MOST))


def _key(row: Mapping[str, Any]) -> bytes | None:
    """None too where there is something that is not compared, as a picture."""
    values = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in sorted(row.items())}
    told = {name: value for name, value in values.items() if value and not isinstance(value, (bool, int, float))}
    if not told:
        return None
    try:
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).digest()
    except TypeError:
        return None
