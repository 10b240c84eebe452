"""The command line in this process: exit code and what was printed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fastpeft.cli import app


@dataclass(frozen=True)
class Answer:
    """Of one command line."""

    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Answer:
    """What `fastpeft ARGUMENTS` answers."""
    capsys.readouterr()
    code = app.run(arguments)
    shown = capsys.readouterr()
    return Answer(code, shown.out, shown.err)
