"""Train a few layers at a time, drawn anew."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError

from ..signals import LayerSignal, of_layers, smoothed
from ..trained import named
from .base import Action, Run


@dataclass(frozen=True)
class SampleOptions:
    """Of a rule with action "sample".

    Attributes:
        layers: how many are trained at a time.
        every: steps until others are drawn.
        signal: layers are drawn in proportion to it, as last measured, what was never drawn first; null: all alike.
    """

    layers: int = 2
    every: int = 20
    signal: LayerSignal | None = None


class Sample(Action):
    """Source: LISA, Pan et al. 2024, arXiv:2403.17919; there heads and embeddings are trained always, as here.

    A layer that is drawn again begins with a fresh optimizer state.
    """

    name: ClassVar[str] = "sample"
    Options: ClassVar[type] = SampleOptions
    chooses_layers: ClassVar[bool] = True
    changes_parameters: ClassVar[bool] = True
    options: SampleOptions

    def __init__(self, options: SampleOptions, number: int, seed: int) -> None:
        super().__init__(options, number, seed)
        self._drawn: list[int] = []
        self._signals: dict[int, float] = {}

    def check(self, config: FastpeftConfig) -> None:
        self.at_least(layers=1, every=1)

    def begin(self, run: Run) -> None:
        if self.options.layers >= len(run.trained.layers):
            raise UserError(
                f"{self.key}.layers: expected less than the model's {len(run.trained.layers)} trained layers, "
                f"got {self.options.layers}"
            )

    def resume(self, run: Run) -> None:
        run.trained.only(self._drawn, run.optimizer)

    def measure(self, run: Run) -> None:
        if self.options.signal is None:
            return
        for number, value in of_layers(run.trained.in_gradient(), self.options.signal).items():
            self._signals[number] = smoothed(self._signals.get(number), value)

    def act(self, run: Run) -> None:
        if run.step % self.options.every:
            return
        draw = random.Random(f"{self.seed} {self.number} {run.step}")
        left = list(run.trained.layers)
        drawn: list[int] = []
        for _ in range(self.options.layers):
            drawn.append(draw.choices(left, self._weights(left))[0])
            left.remove(drawn[-1])
        self._drawn = sorted(drawn)
        run.trained.only(self._drawn, run.optimizer)
        signals = {str(number): value for number, value in sorted(self._signals.items())} or None
        how = "alike" if self.options.signal is None else f"by {self.options.signal}"
        why = f"every {self.options.every} steps, drawn {how}"
        self.decide(run, self.options.signal or "steps", signals, f"layers {named(self._drawn)} trained", why)

    def _weights(self, layers: list[int]) -> list[float]:
        if self.options.signal is None:
            return [1.0] * len(layers)
        if any(fresh := [float(number not in self._signals) for number in layers]):
            return fresh
        weights = [self._signals[number] for number in layers]
        return weights if sum(weights) > 0 else [1.0] * len(layers)

    def state(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "signals": {str(number): value for number, value in self._signals.items()}}

    def restore(self, state: dict[str, Any]) -> None:
        self._drawn = list(state["drawn"])
        self._signals = {int(number): value for number, value in state["signals"].items()}
