"""Figures of each method from the results of its trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from fastpeft.metrics.intervals import Interval, over_rows, over_seeds

from .measures import Columns, Figure
from .methods import METHODS
from .plan import chosen_rates, rates_of, searches
from .runner import Comparison

REFERENCE = "full"
"""The method that others are compared with, where it was tested."""


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method, title: its name, and as papers write it.
        rate: chosen on validation; None if none was.
        seeds: how many tests there are.
        figures: by name of measures.Figure, mean over the seeds with Student's interval; empty without a test.
        rows: the first figure's mean over the seeds with the interval over the test rows: the same rows are drawn for
            all seeds. Seeds and rows pooled would count a row as often as there are seeds.
        difference: of the first figure to REFERENCE with the same seed, with Student's interval; None without.
        trainable, parameters, tokens_per_second, peak_mib, seconds: medians over the tests; 0 or None without.
        failed: why there is no test; None if there is one, or was no time.
        note: what should be looked at; empty for nothing.
    """

    method: str
    title: str
    rate: float | None
    seeds: int
    figures: dict[str, Interval] = field(default_factory=dict)
    rows: Interval | None = None
    difference: Interval | None = None
    trainable: int = 0
    parameters: int = 0
    tokens_per_second: float | None = None
    peak_mib: float = 0.0
    seconds: float = 0.0
    failed: str | None = None
    note: str = ""


def summarise(found: Comparison) -> list[Row]:
    """A row for each method, in the order asked for."""
    chosen = chosen_rates(found.options, found.results, found.config.training.seed)
    chief = found.measure.chief.name
    tested = {name: _tests(found, name, chosen.get(name)) for name in found.options.methods or list(METHODS)}
    reference = {one["seed"]: one["figures"][chief] for one in tested.get(REFERENCE, []) if one["failed"] is None}
    return [_row(found, name, chosen.get(name), results, reference) for name, results in tested.items()]


def _tests(found: Comparison, name: str, rate: float | None) -> list[dict[str, Any]]:
    seeds = range(found.config.training.seed + 1, found.config.training.seed + 1 + found.options.seeds)
    results = (one for one in found.results if one["phase"] == "test" and one["method"] == name)
    return [one for one in results if one["rate"] == rate and one["seed"] in seeds]


def _row(
    found: Comparison,
    name: str,
    rate: float | None,
    results: list[dict[str, Any]],
    reference: dict[int, float],
) -> Row:
    done = [one for one in results if one["failed"] is None]
    title = METHODS[name].title
    if not done:
        return Row(name, title, rate, 0, failed=_failure(found, name, results))
    chief = found.measure.chief
    paired = [one["figures"][chief.name] - reference[one["seed"]] for one in done if one["seed"] in reference]
    speeds = [one["tokens_per_second"] for one in done if one["tokens_per_second"] is not None]
    return Row(
        name,
        title,
        rate,
        len(done),
        figures={name: over_seeds([one["figures"][name] for one in done]) for name in done[0]["figures"]},
        rows=_over_rows(chief, [one["columns"] for one in done]),
        difference=over_seeds(paired) if paired and name != REFERENCE else None,
        trainable=done[0]["trainable"],
        parameters=done[0]["parameters"],
        tokens_per_second=median(speeds) if speeds else None,
        peak_mib=median(one["peak_mib"] for one in done),
        seconds=median(one["seconds"] for one in done),
        note=_note(found, name, rate, done, results),
    )


def _over_rows(figure: Figure, seeds: list[Columns]) -> Interval:
    columns = [[np.asarray(one[name]) for name in figure.columns] for one in seeds]

    def mean(places: Any) -> float:
        return sum(figure.of(*(column[places] for column in one)) for one in columns) / len(columns)

    return over_rows(mean, range(len(columns[0][0])))


def _failure(found: Comparison, name: str, tests: Sequence[dict[str, Any]]) -> str | None:
    keys = {trial.key for trial in searches(found.options, found.config.training.seed) if trial.method == name}
    tried = [one for one in found.results if one["key"] in keys]
    reasons = [one["failed"] for one in (*tests, *tried) if one["failed"] is not None]
    whole = len(tried) == len(keys) and all(one["failed"] is not None for one in tried)
    return reasons[0] if reasons and (tests or whole) else None


def _note(
    found: Comparison, name: str, rate: float | None, done: list[dict[str, Any]], results: list[dict[str, Any]]
) -> str:
    notes = []
    rates = rates_of(name, found.options)
    if len(rates) > 1 and rate in (rates[0], rates[-1]):
        end = "lowest" if rate == rates[0] else "highest"
        notes.append(f"the best rate is the {end} that was tried: strategy.options.ranges.{name} can go further")
    if one_class := sum(len(set(one["columns"].get("guessed", "ab"))) == 1 for one in done):
        notes.append(f"{one_class} of {len(done)} guessed the same for every row")
    if broken := [one["failed"] for one in results if one["failed"] is not None]:
        notes.append(f"{len(broken)} of {len(results)} failed: {broken[0]}")
    return "; ".join(notes)
