"""Train adapters that work at any lower rank too."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError

from ..rank import Adapter, adapters_of, first_alone, put_back
from .base import Action, Run


@dataclass(frozen=True)
class DyloraOptions:
    """Of a rule with action "dylora".

    Attributes:
        least: ranks are drawn from this on, all alike.
        measured: ranks that the evaluation is measured at in the end; null: powers of two, and the whole.
    """

    least: int = 1
    measured: list[int] | None = None


class Dylora(Action):
    """Each step draws a rank b: its loss and gradients are those of the first b ranks of every adapter.

    The others count as zero in that step, so that they get gradients of zero; the optimizer's momentum and weight decay
    move them on. The scaling is lora.alpha over lora.r at every rank.

    Source: DyLoRA, Valipour et al. 2022, arXiv:2210.07558, where all b ranks are updated, not the b-th alone.
    """

    name: ClassVar[str] = "dylora"
    Options: ClassVar[type] = DyloraOptions
    changes_parameters: ClassVar[bool] = True
    options: DyloraOptions

    def __init__(self, options: DyloraOptions, number: int, seed: int) -> None:
        super().__init__(options, number, seed)
        self._adapters: list[Adapter] = []
        self._left_out: list[tuple[Tensor, Tensor]] = []

    def check(self, config: FastpeftConfig) -> None:
        self.at_least(least=1)
        if config.lora.use_dora:
            raise UserError(f"{self.key}.action: expected lora.use_dora false with dylora, got true")

    def begin(self, run: Run) -> None:
        self._adapters = list(adapters_of(run.trainer.model).values())
        largest = self.largest
        if not self._adapters or self.options.least >= largest:
            raise UserError(
                f"{self.key}.least: expected less than the adapters' rank of {largest}, got {self.options.least}"
            )
        if wrong := [rank for rank in self.options.measured or () if not 1 <= rank <= largest]:
            raise UserError(f"{self.key}.measured: expected ranks of 1 to {largest}, got {wrong[0]}")

    @property
    def largest(self) -> int:
        """Rank of the adapters; of the largest, where they differ."""
        return max((adapter.rank for adapter in self._adapters), default=0)

    @property
    def measured(self) -> list[int]:
        """Ranks that the evaluation is to be measured at, ascending."""
        powers = [2**power for power in range(self.largest.bit_length())]
        return sorted({*(self.options.measured or [*powers, self.largest])})

    def act(self, run: Run) -> None:
        if run.step == 0:
            does = f"each step trains the first ranks alone, {self.options.least} to {self.largest} of them"
            self.decide(run, "steps", None, does, "drawn anew at each")

    def begin_step(self, run: Run) -> None:
        rank = random.Random(f"{self.seed} {self.number} {run.step}").randint(self.options.least, self.largest)
        self._left_out = first_alone(self._adapters, rank)

    def measure(self, run: Run) -> None:
        put_back(self._left_out)
        self._left_out = []
