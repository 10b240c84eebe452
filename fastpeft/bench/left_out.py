"""Peers of a benchmark that are not measured."""

from __future__ import annotations


class NotHereError(Exception):
    """A peer that cannot run on this machine, or not in this case; the message says why."""


def reason_of(error: BaseException) -> str:
    """One line, of type and message, for a table."""
    first = str(error).strip().partition("\n")[0]
    return first[:160] if isinstance(error, NotHereError) else f"{type(error).__name__}: {first}"[:160]
