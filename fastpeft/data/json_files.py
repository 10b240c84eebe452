"""What is wrong with a file of JSON, and where; its reader says neither, or ends the process."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable


def unreadable(files: Iterable[str]) -> str | None:
    """Where a row is null, or no text in UTF-8; None where none is.

    pyarrow 26 ends with a segmentation fault where a block of rows begins with null, and takes any bytes for text,
    which fails when a row is looked at. Inside a list or an object that goes over several lines, a line may be null.
    """
    for file in files:
        above = b""
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                words = line.removeprefix(codecs.BOM_UTF8).strip()
                if words.startswith(b"null") and not above.endswith((b"[", b":", b",")):
                    return f"{file}, line {number}: expected a JSON object, got null"
                try:
                    words.decode()
                except UnicodeDecodeError:
                    return f"{file}, line {number}: expected text in UTF-8, got something else"
                above = words or above
    return None


def wrong_line(file: str) -> str | None:
    """Where and why a file of one JSON object a line is none; None for files of another kind."""
    if not file.endswith(("jsonl", "ndjson")):
        return None
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line.rstrip()) if line.strip() else {}
            except json.JSONDecodeError as error:
                return f"{file}, line {number}: not valid JSON: {error.msg} at column {error.colno}"
            except (ValueError, RecursionError) as error:  # more digits, or more brackets, than Python reads
                return f"{file}, line {number}: not valid JSON: {error}"
            if not isinstance(row, dict):
                return f"{file}, line {number}: expected a JSON object, got {type(row).__name__}"
    return None
