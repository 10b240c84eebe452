"""How a worker tells its parent how far it is: one JSON object a line, on what was its standard output."""

from __future__ import annotations

import json
import os
from typing import Any


class Channel:
    """Takes standard output over; whatever is printed from now on goes to standard error, which is a log file."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def status(self, text: str) -> None:
        """What is being done now."""
        self._send(event="status", text=text)

    def step(self, step: int, steps: int, loss: float) -> None:
        """A training step is done."""
        self._send(event="step", step=step, steps=steps, loss=loss)

    def user_error(self, message: str) -> None:
        """The user asked for something that cannot be; the worker ends."""
        self._send(event="user_error", message=message)

    def _send(self, **event: Any) -> None:
        self._file.write(json.dumps(event) + "\n")
