"""What ends a command without being a fault of the program."""

from __future__ import annotations


class UserError(Exception):
    """Shown as one line, without a traceback; the exit code is 2.

    The message names what was given wrongly, what was expected and what came.
    """


class RunFailed(Exception):
    """The work cannot come to a good end, though nothing was given wrongly; shown as one line, the exit code is 1."""


class Interrupted(Exception):
    """A signal ended the work in good order; the exit code is 128 and the signal's number, as shells have it.

    The message says what was saved and how to go on.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
