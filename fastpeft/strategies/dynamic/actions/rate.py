"""Lower the learning rate when the loss falls no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError

from .base import Run
from .plateau import Plateau, PlateauOptions


@dataclass(frozen=True)
class RateOptions(PlateauOptions):
    """Of a rule with action "rate".

    Attributes:
        factor: of the rate that the schedule gives, from then on.
        times: how often at most.
    """

    factor: float = 0.5
    times: int = 3


class Rate(Plateau):
    """As `torch.optim.lr_scheduler.ReduceLROnPlateau`, on top of the run's schedule."""

    name: ClassVar[str] = "rate"
    Options: ClassVar[type] = RateOptions
    options: RateOptions

    def __init__(self, options: RateOptions, number: int, seed: int) -> None:
        super().__init__(options, number, seed)
        self._done = 0

    def check(self, config: FastpeftConfig) -> None:
        super().check(config)
        self.at_least(times=1)
        self.between(0, float("inf"), "factor")
        kind = config.training.lr_scheduler_type
        if kind in ("reduce_lr_on_plateau", "greedy"):
            raise UserError(f"{self.key}.action: expected a training.lr_scheduler_type that is a schedule, got {kind}")

    def ended(self, run: Run, loss: float, why: str) -> None:
        if self._done >= self.options.times:
            return
        self._done += 1
        scheduler, factor = run.trainer.lr_scheduler, self.options.factor
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        for group in run.optimizer.param_groups:
            group["lr"] *= factor
        self.decide(run, self.options.signal, loss, f"learning rate times {factor:g}", why)

    def state(self) -> dict[str, Any]:
        return super().state() | {"done": self._done}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._done = state["done"]
