"""What a row must have in a column; errors name row, column, what was expected and what came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastpeft.errors import UserError

from .chat import short

Row = dict[str, Any]


def words_of(row: Row, column: str, where: str) -> str:
    """A text that is not empty."""
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"{where}, column {column}: expected text, got {short(value)}")
    if not value.strip():
        raise UserError(f"{where}, column {column}: expected text, got an empty one")
    return value


def list_of(value: Any, column: str, kind: type | tuple[type, ...], what: str, where: str) -> list[Any]:
    """A list of values of one type, which `what` names."""
    if not isinstance(value, list):
        raise UserError(f"{where}, column {column}: expected a list of {what}, got {short(value)}")
    for one in value:
        if not isinstance(one, kind):
            raise UserError(f"{where}, column {column}: expected a list of {what}, got {short(one)} in it")
    return value


def class_of(value: Any, numbers: Mapping[str, int], column: str, where: str) -> int:
    """The number of a class that is there by its name."""
    if str(value) not in numbers:
        raise UserError(f"{where}, column {column}: expected one of {', '.join(numbers)}, got {value!r}")
    return numbers[str(value)]


def number_of(row: Row, column: str, where: str) -> float:
    """A finite number, which a table may have as text."""
    value = row[column]
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise UserError(f"{where}, column {column}: expected a number, got {short(value)}")
    return number
