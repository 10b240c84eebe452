"""Freeze layers that hardly change any more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError

from ..signals import LayerSignal, of_layers, smoothed
from ..trained import named
from .base import Action, Run


@dataclass(frozen=True)
class FreezeOptions:
    """Of a rule with action "freeze".

    Attributes:
        signal: of each layer, smoothed.
        below: a layer is frozen when its signal is less than so many times what it is compared with.
        against: the largest of the trained layers' signals, or the layer's own largest so far.
        start: steps before the first is frozen.
        every: steps between two looks.
        order: "bottom": only from the lowest layer up, so that no backward goes below; "any".
        keep: at least so many layers stay trained.
        thaw_after: after so many steps all are trained again and measured anew for `start` steps; null: never.
    """

    signal: LayerSignal = "gradient_norm"
    below: float = 0.5
    against: Literal["largest", "own"] = "largest"
    start: int = 20
    every: int = 10
    order: Literal["bottom", "any"] = "bottom"
    keep: int = 1
    thaw_after: int | None = None


class Freeze(Action):
    """Source of the idea: AutoFreeze, Liu et al. 2021, arXiv:2102.01386, which compares changes of gradient norms."""

    name: ClassVar[str] = "freeze"
    Options: ClassVar[type] = FreezeOptions
    chooses_layers: ClassVar[bool] = True
    changes_parameters: ClassVar[bool] = True
    options: FreezeOptions

    def __init__(self, options: FreezeOptions, number: int, seed: int) -> None:
        super().__init__(options, number, seed)
        self._signals: dict[int, float] = {}
        self._largest: dict[int, float] = {}
        self._frozen: list[int] = []
        self._begun = self._since = 0  # steps at which measuring began, and at which layers were last frozen

    def check(self, config: FastpeftConfig) -> None:
        self.at_least(start=1, every=1, keep=1, thaw_after=1)
        self.between(0, float("inf"), "below")

    def begin(self, run: Run) -> None:
        if self.options.keep >= len(run.trained.layers):
            raise UserError(
                f"{self.key}.keep: expected less than the model's {len(run.trained.layers)} trained layers, "
                f"got {self.options.keep}"
            )

    def resume(self, run: Run) -> None:
        run.trained.only(run.trained.layers.keys() - set(self._frozen), run.optimizer)

    def measure(self, run: Run) -> None:
        for number, value in of_layers(run.trained.in_gradient(), self.options.signal).items():
            self._signals[number] = smoothed(self._signals.get(number), value)
            self._largest[number] = max(self._largest.get(number, 0.0), self._signals[number])

    def act(self, run: Run) -> None:
        options, trained = self.options, run.trained
        if self._frozen and options.thaw_after is not None and run.step - self._since >= options.thaw_after:
            why = f"{options.thaw_after} steps after the last was frozen"
            self.decide(run, "steps", None, f"layers {named(self._frozen)} thawed", why)
            self._frozen, self._signals, self._largest, self._begun = [], {}, {}, run.step
            trained.only(trained.layers, run.optimizer)
        if run.step - self._begun < options.start or run.step % options.every:
            return
        chosen = self._chosen(run)
        if not chosen:
            return
        signals = {str(number): self._signals[number] for number in sorted(trained.active) if number in self._signals}
        compared = "the largest of the trained layers'" if options.against == "largest" else "their own largest"
        self._frozen, self._since = sorted({*self._frozen, *chosen}), run.step
        trained.only(trained.layers.keys() - set(self._frozen), run.optimizer)
        why = f"{options.signal} below {options.below:g} times {compared}"
        self.decide(run, options.signal, signals, f"layers {named(chosen)} frozen", why)

    def _chosen(self, run: Run) -> list[int]:
        """Trained layers that are to be frozen, lowest first."""
        options, chosen = self.options, list[int]()
        active = sorted(run.trained.active)
        known = [self._signals[number] for number in active if number in self._signals]
        largest = max(known, default=0.0)
        for number in active:
            if len(active) - len(chosen) <= options.keep:
                break
            against = largest if options.against == "largest" else self._largest.get(number, 0.0)
            if number in self._signals and self._signals[number] < options.below * against:
                chosen.append(number)
            elif options.order == "bottom":
                break
        return chosen

    def state(self) -> dict[str, Any]:
        return {
            "signals": {str(number): value for number, value in self._signals.items()},
            "largest": {str(number): value for number, value in self._largest.items()},
            "frozen": self._frozen,
            "begun": self._begun,
            "since": self._since,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._signals = {int(number): value for number, value in state["signals"].items()}
        self._largest = {int(number): value for number, value in state["largest"].items()}
        self._frozen, self._begun, self._since = list(state["frozen"]), state["begun"], state["since"]
