"""A diagnosis as text for a terminal, or as JSON."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from .diagnosis import Diagnosis
from .findings import Finding, Status

STYLES = {Status.ok: "green", Status.note: "cyan", Status.warning: "yellow", Status.problem: "red"}
_STATUS_WIDTH = max(len(status.value) for status in Status)
_NARROWEST, _WIDEST = 60, 100  # columns


def as_json(diagnosis: Diagnosis, quiet: bool = False) -> str:
    """One JSON object on one line, in ASCII."""
    return json.dumps(diagnosis.to_dict(quiet), allow_nan=False)


def as_text(diagnosis: Diagnosis, quiet: bool = False, width: int = 80) -> Text:
    """One line or a few for each finding, advice below it after an arrow; with `quiet` only what is not ok."""
    shown = diagnosis.not_ok() if quiet else diagnosis.findings
    column = max((len(finding.name) for finding in shown), default=0)
    lines = Text()
    for finding in shown:
        _append(lines, finding, column, width)
    if not quiet:
        lines.append(f"\nfastpeft {diagnosis.version}: {_summary(diagnosis)}\n")
    return lines


def _append(lines: Text, finding: Finding, column: int, width: int) -> None:
    indent = " " * (_STATUS_WIDTH + column + 4)
    paragraphs = [finding.text, *([f"-> {finding.advice}"] if finding.advice else [])]
    wrapped = [line for paragraph in paragraphs for line in _wrap(paragraph, width - len(indent))]
    lines.append(finding.status.value.ljust(_STATUS_WIDTH), style=STYLES[finding.status])
    lines.append(f"  {finding.name.ljust(column)}  {wrapped[0]}\n")
    for line in wrapped[1:]:
        lines.append(f"{indent}{line}\n")


def _wrap(paragraph: str, width: int) -> list[str]:
    """Addresses and paths stay whole, so that they can be copied."""
    inner = "   " if paragraph.startswith("-> ") else ""
    lines = textwrap.wrap(paragraph, width, subsequent_indent=inner, break_long_words=False, break_on_hyphens=False)
    return lines or [""]


def _summary(diagnosis: Diagnosis) -> str:
    return ", ".join(_counts(diagnosis)) or "nothing to remark"


def _counts(diagnosis: Diagnosis) -> Iterator[str]:
    for status in (Status.problem, Status.warning, Status.note):
        if count := sum(finding.status is status for finding in diagnosis.findings):
            yield f"{count} {status.value}{'' if count == 1 else 's'}"


def show(diagnosis: Diagnosis, quiet: bool = False) -> None:
    """Print the text; in colour where stdout is a terminal and NO_COLOR is not set."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    width = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    text = as_text(diagnosis, quiet, width)
    # a GPU's name or a path may hold what the terminal's encoding cannot show
    encoding = console.encoding or "ascii"
    if text.plain.encode(encoding, "replace").decode(encoding) != text.plain:
        text = Text(text.plain.encode("ascii", "backslashreplace").decode())
    console.print(text, end="")
