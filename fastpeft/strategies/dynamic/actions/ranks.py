"""Take ranks from modules that need them least, until a budget is met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError

from ..rank import Adapter, adapters_of
from .base import Action, Run


@dataclass(frozen=True)
class RanksOptions:
    """Of a rule with action "ranks".

    Attributes:
        budget: ranks of all adapters together in the end; each keeps one at least.
        start: steps before the first is taken away.
        end: steps at which the budget is met; between, the sum falls as a cube.
        every: steps between two looks.
        smoothing: share of the past in a rank's importance.
    """

    budget: int
    start: int = 20
    end: int = 100
    every: int = 10
    smoothing: float = 0.85


class Ranks(Action):
    """What is left of an adapter is smaller: its values, gradients and optimizer state too.

    The schedule and the importance (smoothed |value times gradient|, its mean over a rank's row of A plus that over its
    column of B) are AdaLoRA's; it is LoRA that is pruned, not a singular value decomposition.

    Source: AdaLoRA, Zhang et al. 2023, arXiv:2303.10512.
    """

    name: ClassVar[str] = "ranks"
    Options: ClassVar[type] = RanksOptions
    changes_parameters: ClassVar[bool] = True
    options: RanksOptions

    def __init__(self, options: RanksOptions, number: int, seed: int) -> None:
        super().__init__(options, number, seed)
        self._adapters: dict[str, Adapter] = {}
        self._scores: dict[str, Any] = {}
        self._total = 0

    def check(self, config: FastpeftConfig) -> None:
        self.at_least(budget=1, start=1, every=1, end=self.options.start)
        self.between(0, 1, "smoothing")
        if config.lora.use_dora:
            raise UserError(f"{self.key}.action: expected lora.use_dora false with ranks, got true")

    def begin(self, run: Run) -> None:
        self._adapters = adapters_of(run.trainer.model)
        count, ranks = len(self._adapters), sum(adapter.rank for adapter in self._adapters.values())
        if self.options.budget < count:
            raise UserError(
                f"{self.key}.budget: expected at least one for each of {count} adapters, got {self.options.budget}"
            )
        if not self._total and self.options.budget >= ranks:
            raise UserError(
                f"{self.key}.budget: expected less than the {ranks} ranks there are, got {self.options.budget}"
            )
        self._total = self._total or ranks

    def measure(self, run: Run) -> None:
        for path, adapter in self._adapters.items():
            if adapter.a.grad is None or adapter.b.grad is None:
                continue
            now = adapter.importance().nan_to_num(0.0, 0.0, 0.0)  # fp16's first gradients overflow
            before = self._scores.get(path)
            smoothing = self.options.smoothing
            self._scores[path] = now if before is None else smoothing * before.to(now) + (1 - smoothing) * now

    def act(self, run: Run) -> None:
        options = self.options
        if run.step < options.start or not self._scores:
            return
        if run.step % options.every and run.step != options.end:
            return
        ranks = sum(adapter.rank for adapter in self._adapters.values())
        left = max(0.0, 1 - (run.step - options.start) / max(1, options.end - options.start))
        wanted = options.budget + round((self._total - options.budget) * left**3)
        if wanted >= ranks:
            return
        taken = {}
        for path, kept in self._chosen(wanted).items():
            adapter = self._adapters[path]
            if len(kept) < adapter.rank:
                taken[path] = float(adapter.rank - len(kept))
                adapter.keep(kept, run.optimizer)
                self._scores[path] = self._scores[path][kept]
        why = f"{wanted} of {self._total} ranks at step {run.step}, the least important go"
        self.decide(run, "importance", taken, f"{ranks - wanted} ranks taken from {len(taken)} adapters", why)

    def _chosen(self, wanted: int) -> dict[str, list[int]]:
        """By adapter, which ranks are kept: the most important of each, then the most important of all others."""
        kept: dict[str, list[int]] = {}
        others = []
        for path, adapter in self._adapters.items():
            scores = self._scores[path].tolist() if path in self._scores else [0.0] * adapter.rank
            first = max(range(adapter.rank), key=lambda place: (scores[place], -place))
            kept[path] = [first]
            others += [(-score, path, place) for place, score in enumerate(scores) if place != first]
        for _, path, place in sorted(others)[: wanted - len(kept)]:
            kept[path].append(place)
        return {path: sorted(places) for path, places in kept.items()}

    def state(self) -> dict[str, Any]:
        return {
            "total": self._total,
            "ranks": {path: [adapter.rank, adapter.alpha] for path, adapter in self._adapters.items()},
            "scores": {path: scores.tolist() for path, scores in self._scores.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._total = state["total"]
        self._scores = {path: torch.tensor(scores) for path, scores in state["scores"].items()}
