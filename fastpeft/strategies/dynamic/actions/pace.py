"""Learn the rows first that are easy for the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from fastpeft.config import FastpeftConfig

from .base import Action, Run

if TYPE_CHECKING:
    from ..losses import Tokens


@dataclass(frozen=True)
class PaceOptions:
    """Of a rule with action "pace".

    Attributes:
        signal: a row's loss, the mean over its tokens.
        share: of the rows that are learned in the beginning, those with the lowest losses.
        until: steps at which all are; between, the share grows evenly.
        window: how many of the last rows a row is compared with.
        every: steps between two entries of the log.
    """

    signal: Literal["loss"] = "loss"
    share: float = 0.5
    until: int = 100
    window: int = 256
    every: int = 20


class Pace(Action):
    """A row whose loss is above that of the share wanted of the last rows has weight 0 in its step.

    Losses are those of the forward pass that trains, so that nothing is computed twice; backward is not saved by it.

    Source: Self-Paced Learning for Latent Variable Models, Kumar, Packer and Koller 2010 (NeurIPS 23).
    """

    name: ClassVar[str] = "pace"
    Options: ClassVar[type] = PaceOptions
    weighs: ClassVar[bool] = True
    options: PaceOptions

    def __init__(self, options: PaceOptions, number: int, seed: int) -> None:
        super().__init__(options, number, seed)
        self._last: list[float] = []
        self._limit: float | None = None
        self._learned = self._seen = 0
        self._step = 0

    def check(self, config: FastpeftConfig) -> None:
        self.at_least(until=1, window=2, every=1)
        self.between(0, 1, "share")

    def resume(self, run: Run) -> None:
        self._step = run.step

    def act(self, run: Run) -> None:
        self._step = run.step
        if run.step and run.step <= self.options.until and run.step % self.options.every == 0:
            does = f"{self._learned} of the last {self._seen} rows learned"
            self.decide(run, "loss", self._limit, does, f"the share wanted is {self._share:.2f}")
            self._learned = self._seen = 0

    @property
    def _share(self) -> float:
        return min(1.0, self.options.share + (1 - self.options.share) * self._step / self.options.until)

    def weights(self, tokens: Tokens) -> Any:
        if self._share >= 1:
            return None
        losses = tokens.row_losses()
        self._last = [*self._last, *losses.tolist()][-self.options.window :]
        self._limit = float(torch.quantile(torch.tensor(self._last), self._share))
        learned = losses <= self._limit
        self._learned += int(learned.sum())
        self._seen += len(losses)
        return learned.to(tokens.nll.dtype)[tokens.rows]

    def state(self) -> dict[str, Any]:
        return {"last": self._last, "limit": self._limit, "learned": self._learned, "seen": self._seen}

    def restore(self, state: dict[str, Any]) -> None:
        self._last, self._limit = list(state["last"]), state["limit"]
        self._learned, self._seen = state["learned"], state["seen"]
