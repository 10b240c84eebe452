"""What a strategy found out about its run: rows of the report, and text below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A figure with what it is compared with.

    Attributes:
        name: such as "accuracy".
        value: with what was trained.
        low, high: ends of the 95 % interval; None where it has none.
        rows: over how many rows, which is what the interval is about.
        baseline: the same of what it is compared with; None for nothing.
        against: what that is, such as "the most frequent class" or "before training".
        better: which way is better.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    rows: int = 0
    baseline: float | None = None
    against: str = ""
    better: Literal["higher", "lower"] = "higher"

    @property
    def beats(self) -> bool | None:
        """Whether the interval (or the value, without one) lies on the better side of the baseline."""
        if self.baseline is None:
            return None
        if self.better == "higher":
            return (self.value if self.low is None else self.low) > self.baseline
        return (self.value if self.high is None else self.high) < self.baseline


@dataclass(frozen=True)
class Section:
    """A part of report.md: a title and Markdown below it."""

    title: str
    text: str


@dataclass(frozen=True)
class Findings:
    """Of one run.

    Attributes:
        metrics: in the order of the report.
        notes: what should be looked at.
        sections: of the report.
    """

    metrics: tuple[Metric, ...] = ()
    notes: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()

    def __add__(self, other: Findings) -> Findings:
        """Both, the other's after these."""
        return Findings(self.metrics + other.metrics, self.notes + other.notes, self.sections + other.sections)

    def lines(self) -> list[str]:
        """Markdown: a table of the metrics, then the sections; the notes stand elsewhere."""
        found: list[str] = []
        if self.metrics:
            found += ["", "## Result", "", "| | | 95 % interval | rows | baseline |", "|---|---|---|---|---|"]
            found += [_row(metric) for metric in self.metrics]
        for section in self.sections:
            found += ["", f"## {section.title}", "", section.text.rstrip()]
        return found


def _row(metric: Metric) -> str:
    interval = "" if metric.low is None or metric.high is None else f"{metric.low:.4g} to {metric.high:.4g}"
    baseline = "" if metric.baseline is None else f"{metric.baseline:.4g} ({metric.against}), {_verdict(metric)}"
    return f"| {metric.name} | {metric.value:.4g} | {interval} | {metric.rows or ''} | {baseline} |"


def _verdict(metric: Metric) -> str:
    return "beaten" if metric.beats else "not beaten"
