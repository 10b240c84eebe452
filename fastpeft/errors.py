"""Mistakes that a user can put right."""

from __future__ import annotations


class UserError(Exception):
    """Shown as one line, without a traceback; the exit code is 2.

    The message names what was given wrongly, what was expected and what came.
    """
