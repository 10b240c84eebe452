"""What two fine-tunings gave: a table for people, records for programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, NamedTuple

from rich.table import Table

from fastpeft.bench.records import Environment, Record
from fastpeft.structured import build

from .curves import Agreement
from .settings import Settings

ENOUGH_STEPS = 20
"""For a spread to mean anything."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning, as the worker measures it and its file has it.

    Attributes:
        losses: of every step.
        step_seconds: forward, backward and optimizer of every timed step.
        peak_mib, peak_method: see PeakMemory.
        kept_mib: see bytes_kept.
        perplexity_before, perplexity_after: on the held-out text.
        threads: of torch.
    """

    losses: list[float]
    step_seconds: list[float]
    peak_mib: float
    peak_method: str
    kept_mib: float
    perplexity_before: float
    perplexity_after: float
    threads: int

    @classmethod
    def from_dict(cls, data: Any) -> Run:
        return build(cls, data)

    @property
    def diverged(self) -> str | None:
        """Where the loss ceased to be a number; None for a run that is fit to be compared."""
        for step, loss in enumerate(self.losses, 1):
            if not math.isfinite(loss):
                return f"the loss of step {step} is {loss}"
        if not math.isfinite(self.perplexity_after):
            return f"the held-out perplexity afterwards is {self.perplexity_after}"
        return None

    @property
    def disturbed(self) -> bool:
        """Whether step times vary more than on an idle machine: the middle half by over a fifth of their median."""
        if len(self.step_seconds) < ENOUGH_STEPS:
            return False
        low, middle, high = quantiles(self.step_seconds, n=4)
        return high - low > 0.2 * middle

    @property
    def improved(self) -> bool:
        return self.perplexity_after < self.perplexity_before


class Quantity(NamedTuple):
    """One row: what it is called here and in a record, and each run's samples."""

    what: str
    metric: str
    unit: str
    plain: list[float]
    fast: list[float]


@dataclass(frozen=True)
class Outcome:
    """Both fine-tunings and what they ran on."""

    settings: Settings
    plain: Run
    fast: Run
    agreement: Agreement
    verified: dict[str, Any]

    @property
    def passed(self) -> bool:
        improved = self.plain.improved and self.fast.improved
        return bool(self.verified["passed"]) and self.agreement.passed and improved

    def quantities(self) -> list[Quantity]:
        """What the table and the records are made of."""
        plain, fast = self.plain, self.fast
        size = self.settings.batch_size * self.settings.sequence_length
        peak = "peak GPU memory" if self.on_gpu else "peak memory above the loaded model"

        def quantity(what: str, metric: str, unit: str, of: Callable[[Run], list[float]]) -> Quantity:
            return Quantity(what, metric, unit, of(plain), of(fast))

        return [
            quantity("training speed", "throughput", "tokens/s", lambda run: [size / s for s in run.step_seconds]),
            quantity("time per step", "step_time", "ms", lambda run: [1e3 * s for s in run.step_seconds]),
            quantity(peak, "peak_memory", "MiB", lambda run: [run.peak_mib]),
            quantity("kept for backward", "kept_for_backward", "MiB", lambda run: [run.kept_mib]),
            quantity("held-out perplexity before", "perplexity_before", "1", lambda run: [run.perplexity_before]),
            quantity("held-out perplexity after", "perplexity_after", "1", lambda run: [run.perplexity_after]),
        ]

    @property
    def on_gpu(self) -> bool:
        return bool(self.verified["environment"]["device_type"] == "cuda")

    @property
    def case(self) -> str:
        s = self.settings
        shape = f"{s.batch_size} x {s.sequence_length} tokens, rank {s.rank}"
        return f"{self.verified['architecture']}, {s.quantization}, {self.verified['dtype']}, {shape}"

    def table(self) -> Table:
        """One row a quantity; medians."""
        table = Table(title=self.case, title_justify="left")
        table.add_column("")
        for name in ("plain PEFT", "fastpeft", "fastpeft / plain"):
            table.add_column(name, justify="right", no_wrap=True)
        for what, _, unit, plain, fast in self.quantities():
            a, b = median(plain), median(fast)
            name = what if unit == "1" else f"{what} ({unit})"
            table.add_row(name, _figure(a), _figure(b), f"{b / a:.2f}" if a else "-")
        return table

    def records(self) -> Iterator[Record]:
        """Everything measured; the losses of fastpeft's run carry how far they are from PEFT's."""
        environment = build(Environment, self.verified["environment"])
        s = self.settings
        settings = {
            "model": "shipped" if s.shipped_model else s.model,
            "text": "shipped" if s.shipped_text else s.text,
            "steps": s.steps,
            "batch_size": s.batch_size,
            "sequence_length": s.sequence_length,
            "rank": s.rank,
            "learning_rate": s.learning_rate,
            "quantization": s.quantization,
            "dtype": self.verified["dtype"],
            "seed": s.seed,
            "threads": self.plain.threads,
        }

        def record(peer: str, metric: str, unit: str, samples: list[float], **others: Any) -> Record:
            return Record(
                suite="quickstart",
                case=self.case,
                op="fine_tuning",
                peer=peer,
                metric=metric,
                unit=unit,
                samples=samples,
                median=median(samples),
                environment=environment,
                settings={**settings, **others.pop("settings", {})},
                **others,
            )

        for _, metric, unit, plain, fast in self.quantities():
            extra = {"settings": {"method": self.plain.peak_method}} if metric == "peak_memory" else {}
            yield record("peft", metric, unit, plain, **extra)
            yield record("fastpeft", metric, unit, fast, **extra)
        yield record("peft", "loss", "nats", self.plain.losses)
        error = {"error": self.agreement.relative, "budget": self.agreement.tolerance}
        yield record("fastpeft", "loss", "nats", self.fast.losses, **error)

    def report(self) -> dict[str, Any]:
        """What report.json holds."""
        return {
            "passed": self.passed,
            "verify_passed": bool(self.verified["passed"]),
            "curves_agree": self.agreement.passed,
            "largest_loss_difference": self.agreement.largest,
            "largest_relative_loss_difference": self.agreement.relative,
            "allowed_relative_loss_difference": self.agreement.tolerance,
            "perplexity_fell": self.plain.improved and self.fast.improved,
            "records": [record.to_dict() for record in self.records()],
        }


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 10 else f"{value:.1f}"
