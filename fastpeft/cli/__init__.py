"""The `fastpeft` command: one small file a command, nothing heavy imported before a command runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `fastpeft` command."""
    from .app import run

    sys.exit(run(sys.argv[1:]))
