"""Files of JSON, line by line, where their reader ends the process, or does not say what is wrong."""

from __future__ import annotations

import codecs
import json
import re
from itertools import accumulate
from pathlib import Path

from fastpeft.errors import UserError

DEEPEST = 256
"""Brackets within brackets of a row. Arrow's reader of JSON ends the process a few thousand further on."""
_ESCAPED, _STRINGS = re.compile(rb"\\.", re.DOTALL), re.compile(rb'"[^"]*"')
_OTHERS = bytes(set(range(256)) - set(b'[]{}"'))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord('"'): 0}


def check_lines(file: Path, key: str) -> None:
    """Look at each line before pyarrow does.

    It ends the process where a row is nested too deeply, and where a block of rows begins with null; and it takes any
    bytes for text, which fails when a row is looked at. Inside a list or an object that goes over several lines, a line
    may be null.

    Raises:
        UserError: a row is null, no text in UTF-8, or nested beyond any row; file and line are named.
    """
    above, depth = b"", 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            words = line.removeprefix(codecs.BOM_UTF8).strip()
            brackets = _brackets(line)
            if brackets != b"{}":  # as of most rows
                steps = [_STEPS[bracket] for bracket in brackets]
                if depth + max(accumulate(steps), default=0) > DEEPEST:
                    raise UserError(f"{key}: {file}, line {number}: expected at most {DEEPEST} brackets in one another")
                depth = max(0, depth + sum(steps))
            if words.startswith(b"null") and not above.endswith((b"[", b":", b",")):
                raise UserError(f"{key}: {file}, line {number}: expected a JSON object, got null")
            try:
                words.decode()
            except UnicodeDecodeError:
                raise UserError(f"{key}: {file}, line {number}: expected text in UTF-8, got something else") from None
            above = words or above


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


def _brackets(line: bytes) -> bytes:
    """Of a line of JSON, in their order, without those within texts."""
    plain = _ESCAPED.sub(b"", line) if b"\\" in line else line
    return _STRINGS.sub(b"", plain.translate(None, _OTHERS))
