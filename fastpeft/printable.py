"""Text of others on a terminal, which takes some characters for commands: to write elsewhere, or to the clipboard."""

from __future__ import annotations

import unicodedata


def printable(value: object) -> str:
    """One line: without line breaks, control characters, marks of direction and lone surrogates."""
    return without_commands(" ".join(str(value).split()))


def without_commands(text: str) -> str:
    """The text without control characters but line breaks and tabs, marks of direction and lone surrogates."""
    return text if text.isprintable() else "".join(one for one in text if one in _KEPT or not _commands(one))


def _commands(letter: str) -> bool:
    return unicodedata.category(letter)[0] == "C"


_KEPT = "\n\t\u200c\u200d"
"""The last two join letters, or part them: of some scripts' spelling, and of pictures."""
