"""End the run when the loss falls no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Run
from .plateau import Plateau, PlateauOptions


@dataclass(frozen=True)
class StopOptions(PlateauOptions):
    """Of a rule with action "stop"."""


class Stop(Plateau):
    """The adapter is that of the last step; `early_stopping` of the task strategy keeps the best."""

    name: ClassVar[str] = "stop"
    Options: ClassVar[type] = StopOptions
    options: StopOptions

    def ended(self, run: Run, loss: float, why: str) -> None:
        run.over = True
        self.decide(run, self.options.signal, loss, "run ended", why)
