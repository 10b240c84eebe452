"""Train given layers from given steps on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError

from ..trained import named
from .base import Action, Run


@dataclass(frozen=True)
class Stage:
    """One of a schedule's.

    Attributes:
        at: from so many done steps on.
        trained: numbers of layers, 0 for the lowest, -1 for the highest; or "all".
    """

    at: int
    trained: list[int] | Literal["all"]


@dataclass(frozen=True)
class ScheduleOptions:
    """Of a rule with action "schedule".

    Attributes:
        stages: by step.
    """

    stages: list[Stage] = field(default_factory=list)


class Schedule(Action):
    """Gradual unfreezing among others: Howard and Ruder 2018, arXiv:1801.06146."""

    name: ClassVar[str] = "schedule"
    Options: ClassVar[type] = ScheduleOptions
    chooses_layers: ClassVar[bool] = True
    changes_parameters: ClassVar[bool] = True
    options: ScheduleOptions

    def check(self, config: FastpeftConfig) -> None:
        steps = [stage.at for stage in self.options.stages]
        if not steps or steps != sorted(set(steps)) or steps[0] < 0:
            raise UserError(f"{self.key}.stages: expected at least one, with at from 0 upwards, got {steps}")

    def begin(self, run: Run) -> None:
        layers = run.trained.layers
        count = max(layers) + 1
        for place, stage in enumerate(self.options.stages):
            key = f"{self.key}.stages[{place}].trained"
            if stage.trained == "all":
                continue
            if not stage.trained and not run.trained.others:
                raise UserError(
                    f"{key}: expected at least one layer, got none: nothing would be trained at step {stage.at}"
                )
            for number in stage.trained:
                if (number + count if number < 0 else number) not in layers:
                    raise UserError(f"{key}: expected layers of {named(layers)} with something to train, got {number}")

    def resume(self, run: Run) -> None:
        begun = [stage for stage in self.options.stages if stage.at <= run.step]
        if begun:
            run.trained.only(self._numbers(run, begun[-1]), run.optimizer)

    def act(self, run: Run) -> None:
        for stage in self.options.stages:
            if stage.at == run.step:
                numbers = self._numbers(run, stage)
                run.trained.only(numbers, run.optimizer)
                self.decide(run, "steps", None, f"layers {named(numbers)} trained", f"from step {stage.at} on")

    def _numbers(self, run: Run, stage: Stage) -> list[int]:
        layers = run.trained.layers
        if stage.trained == "all":
            return list(layers)
        count = max(layers) + 1
        return sorted({number + count if number < 0 else number for number in stage.trained})
