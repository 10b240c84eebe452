"""Which learning rate: short runs from the same fresh adapter, compared by their loss on rows that are held back."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastpeft.errors import RunFailed, UserError
from fastpeft.structured import convert

from .folder import RATES


@dataclass(frozen=True)
class RateSearch:
    """Settings.

    Attributes:
        rates: to try; or
        low, high, count: so many between these two, evenly on a logarithmic scale.
        steps: of each run; the schedule is the run's, as if it had no more.
        rows: of those held back, at most so many measure the loss.
    """

    rates: list[float] | None = None
    low: float | None = None
    high: float | None = None
    count: int = 5
    steps: int = 50
    rows: int = 500

    def check(self) -> None:
        """Raises UserError for rates that are none or fewer than two, or numbers out of range."""
        if (self.rates is None) == (self.low is None and self.high is None):
            raise UserError("strategy.options.rate_search: expected either rates, or low and high")
        if self.rates is None and not (self.low is not None and self.high is not None and 0 < self.low < self.high):
            raise UserError(
                f"strategy.options.rate_search.low: expected more than 0 and less than "
                f"strategy.options.rate_search.high, got {self.low} and {self.high}"
            )
        for name, least in (("count", 2), ("steps", 1), ("rows", 1)):
            if getattr(self, name) < least:
                raise UserError(
                    f"strategy.options.rate_search.{name}: expected at least {least}, got {getattr(self, name)}"
                )
        if self.rates is not None and (len(set(self.rates)) < 2 or not all(0 < rate < math.inf for rate in self.rates)):
            raise UserError(
                f"strategy.options.rate_search.rates: expected at least two different ones above 0, got {self.rates}"
            )

    @property
    def tried(self) -> list[float]:
        """All rates, the lowest first."""
        if self.rates is not None:
            return sorted(set(self.rates))
        assert self.low is not None and self.high is not None
        step = math.log(self.high / self.low) / (self.count - 1)
        return [float(f"{self.low * math.exp(step * number):.6g}") for number in range(self.count)]


class Trial(NamedTuple):
    """One short run: its rate, and its loss in the end; infinite where that is no number."""

    rate: float
    loss: float


def try_rate(make: Callable[[Any], Any], arguments: Any, rate: float, steps: int) -> Trial:
    """One short run, of which nothing is kept.

    Args:
        make: a trainer with a fresh model, from its arguments.
        arguments: of the run that the search is for; they stay as they are.
    """
    import gc

    import torch

    trainer = make(_short(arguments, rate, steps))
    trainer.train()
    loss = float(trainer.evaluate()["eval_loss"])
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Trial(rate, loss if math.isfinite(loss) else math.inf)


def best(trials: list[Trial]) -> Trial:
    """The one with the lowest loss, of equal ones the lowest rate.

    Raises:
        RunFailed: no loss is a number.
    """
    found = min(trials, key=lambda trial: (trial.loss, trial.rate))
    if math.isinf(found.loss):
        tried = ", ".join(f"{trial.rate:g}" for trial in trials)
        raise RunFailed(f"strategy.options.rate_search: no rate gave a loss that is a number: {tried}")
    return found


def table(trials: list[Trial]) -> str:
    """Markdown."""
    chosen = best(trials)
    lines = ["| learning rate | evaluation loss | |", "|---|---|---|"]
    for trial in trials:
        loss = "not a number" if math.isinf(trial.loss) else f"{trial.loss:.4f}"
        lines.append(f"| {trial.rate:g} | {loss} | {'taken' if trial == chosen else ''} |")
    return "\n".join(lines)


def write(trials: list[Trial], folder: Path) -> None:
    """For a run that goes on from here."""
    (folder / RATES).write_text(json.dumps([trial._asdict() for trial in trials], indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> list[Trial] | None:
    """What `write` left; None where it left nothing, or something else is there."""
    try:
        found = json.loads((folder / RATES).read_text(encoding="utf-8"))
        return [Trial(*(convert(float, trial[name], name) for name in Trial._fields)) for trial in found]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _short(arguments: Any, rate: float, steps: int) -> Any:
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    short = copy.copy(arguments)
    short.learning_rate, short.max_steps, short.report_to = rate, steps, []
    short.eval_strategy, short.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    short.load_best_model_at_end = False
    if short.warmup_steps:
        short.warmup_steps = min(short.warmup_steps, 0.1)  # a share: the run's own number may be more than all
    return short
