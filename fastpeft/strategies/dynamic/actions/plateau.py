"""Whether a loss still falls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastpeft.config import FastpeftConfig

from ..signals import RunSignal, smoothed
from .base import Action, Run


@dataclass(frozen=True)
class PlateauOptions:
    """Of rules that wait for a loss to fall no more.

    Attributes:
        signal: "validation", or the smoothed "loss" of the training rows.
        patience: how many looks in a row without a lower one.
        improvement: by how much it must be lower.
        every: steps between two looks at "loss"; "validation" is looked at when it is evaluated.
    """

    signal: RunSignal = "validation"
    patience: int = 2
    improvement: float = 0.0
    every: int = 20


class Plateau(Action):
    """A rule that acts when the loss does not fall any more."""

    options: Any

    def __init__(self, options: Any, number: int, seed: int) -> None:
        super().__init__(options, number, seed)
        self._best: float | None = None
        self._waited = 0
        self._smoothed: float | None = None

    def check(self, config: FastpeftConfig) -> None:
        self.at_least(patience=1, improvement=0, every=1)

    def act(self, run: Run) -> None:
        if self.options.signal != "loss" or run.loss is None:
            return
        self._smoothed = smoothed(self._smoothed, run.loss)
        if run.step % self.options.every == 0:
            self._look(run, self._smoothed)

    def evaluated(self, run: Run, loss: float) -> None:
        if self.options.signal == "validation":
            self._look(run, loss)

    def _look(self, run: Run, loss: float) -> None:
        if self._best is None or loss < self._best - self.options.improvement:
            self._best, self._waited = loss, 0
            return
        self._waited += 1
        if self._waited >= self.options.patience:
            self._waited = 0
            self.ended(run, loss, f"no {self.options.signal} below {self._best:.4f} for {self.options.patience} looks")

    def ended(self, run: Run, loss: float, why: str) -> None:
        """The loss did not fall for as long as was waited."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {"best": self._best, "waited": self._waited, "smoothed": self._smoothed}

    def restore(self, state: dict[str, Any]) -> None:
        self._best, self._waited, self._smoothed = state["best"], state["waited"], state["smoothed"]
