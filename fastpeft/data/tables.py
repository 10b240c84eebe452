"""CSV and TSV: every cell is text as it stands, an empty one null, and every line has the header's fields."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastpeft.errors import UserError

NUMBER = re.compile(r"[+-]?[0-9]{1,18}")


def csv_options(datasets: Any, files: list[str], key: str, label: str) -> dict[str, Any]:
    """For `datasets.load_dataset("csv", ...)`, whose guesses at types, missing values and an index change data.

    Args:
        files: of one kind, with the same header.
        key: the configuration's name for the path, for messages.
        label: column of classes, the only one that may be numbers.

    Raises:
        UserError: a line with more or fewer fields than the header, a name that comes twice, or another header.
    """
    separator = "\t" if files[0].lower().endswith(".tsv") else ","
    names: list[str] = []
    numbers = True
    for file in files:
        rows = _checked(file, separator, key)
        found = next(rows, [])
        if names and found != names:
            raise UserError(f"{key}: expected the columns {', '.join(names)} in {file} too, got {', '.join(found)}")
        names = found
        place = names.index(label) if label in names else None
        for row in rows:
            numbers = numbers and place is not None and NUMBER.fullmatch(row[place]) is not None
    kinds = {name: datasets.Value("int64" if name == label and numbers else "string") for name in names}
    read = {"sep": separator, "header": 0, "column_names": names, "index_col": False}
    return read | {"keep_default_na": False, "na_values": [""], "features": datasets.Features(kinds) if names else None}


def _checked(file: str, separator: str, key: str) -> Iterator[list[str]]:
    """The names of the columns, then the rows."""
    names: list[str] = []
    with open(file, encoding="utf-8-sig", newline="") as lines, _fields_of_any_size():
        rows = csv.reader(lines, delimiter=separator)
        begins = 1
        for row in rows:
            if row and not names:
                names = row = [name or f"Unnamed: {number}" for number, name in enumerate(row)]  # as pandas has it
                if twice := next((name for name in names if names.count(name) > 1), None):
                    raise UserError(f"{key}: {file}: expected each column once, got {twice!r} twice")
            if row and len(row) != len(names):
                hint = "; a text with the separator in it is put in quotes" if len(row) > len(names) else ""
                raise UserError(
                    f"{key}: {file}, line {begins}: expected {len(names)} fields, as in the header, "
                    f"got {len(row)}{hint}"
                )
            if row:
                yield row
            begins = rows.line_num + 1


@contextmanager
def _fields_of_any_size() -> Iterator[None]:
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)
