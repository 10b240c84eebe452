"""Text of records in documents. Records may come from anybody: whatever they say is shown, and nothing of it runs."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

from fastpeft.printable import printable

_MARKS = {ord(mark): f"&#{ord(mark)};" for mark in "\\`*_{}[]<>&#|~$^"}
_FOLDERS = re.compile(r"(?<![\w.~/:-])/(?:[\w.+-]+/)+|\b[A-Z]:\\(?:[\w.+-]+\\)*")


def plain(value: object, most: int = 200) -> str:
    """One line of printable text."""
    text = printable(value)
    return text if len(text) <= most else text[: most - 4] + " ..."


def markdown(value: object, most: int = 200) -> str:
    """Text for Markdown, in which no character means anything; not for the start of a line."""
    # GitHub makes links of bare addresses.
    return plain(value, most).translate(_MARKS).replace("://", "&#58;//").replace("www.", "www&#46;")


def markup(value: object, most: int = 200) -> str:
    """Text for HTML, between tags or in a quoted attribute."""
    return html.escape(plain(value, most), quote=True)


def short(value: object, most: int) -> str:
    """Plain text of a length, without its middle: cases differ at their ends."""
    text = plain(value)
    return text if len(text) <= most else f"{text[: most - 25]} ... {text[-20:]}"


def reason(value: object) -> str:
    """What kept a peer from being measured, without the folders of the machine it was tried on."""
    return _FOLDERS.sub("", plain(value))


def number(value: float | None) -> str:
    """Three digits that count; whole from a hundred on; "" for None."""
    if value is None:
        return ""
    size = abs(value)
    if 0 < size < 0.9995:
        return f"{value:#.3g}"
    return f"{value:.{0 if size >= 99.95 or not size else 1 if size >= 9.995 else 2}f}"


def ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells must be Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def slug(*words: str) -> str:
    """A file name of letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-") or "unnamed"
