"""What a comparison leaves: report.md, comparison.svg, results.json, and a table for the console."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastpeft.bench.records import environment
from fastpeft.metrics.intervals import Interval
from fastpeft.models.devices import pick_device
from fastpeft.requirements import require

from .folder import FIGURE, REPORT, RESULTS
from .measures import Figure, Measure
from .methods import METHODS
from .plan import rates_of, searches
from .runner import Comparison
from .summary import Row, summarise


def write(found: Comparison) -> tuple[str, str]:
    """Write the files; returns (the table as text, results.json)."""
    rows, folder = summarise(found), Path(found.config.training.output_dir).expanduser()
    results = json.dumps(_plain(to_dict(found, rows)), indent=1, allow_nan=False) + "\n"
    (folder / RESULTS).write_text(results, encoding="utf-8")
    plot(found.measure, rows, folder / FIGURE)
    (folder / REPORT).write_text(report(found, rows), encoding="utf-8")
    return "\n".join(table(found.measure, rows) + _left(found)), results


def to_dict(found: Comparison, rows: list[Row]) -> dict[str, Any]:
    """Everything that the report says, and each trial, for programs."""
    splits = found.splits
    return {
        "model": Path(found.config.model.name).name,
        "complete": found.missing == 0,
        "data": {
            "train": len(splits.train),
            "validation": len(splits.validation),
            "test": len(splits.test),
            "repeated": splits.exact,
            "nearly_repeated": splits.near,
            "other_label_than_its_twin": splits.ambiguous,
            "unused": splits.unused,
            "labels": found.config.data.labels,
            "max_length": found.config.data.max_length,
        },
        "options": asdict(found.options),
        "training": asdict(found.config.training) | {"output_dir": None},
        "lora": asdict(found.config.lora),
        "accelerated": found.config.acceleration.enabled,
        "task": found.config.model.task,
        "baseline": found.measure.baseline(),
        "baseline_is": found.measure.against,
        "methods": [asdict(row) for row in rows],
        "trials": [{name: value for name, value in one.items() if name != "columns"} for one in found.results],
        "environment": asdict(environment(pick_device().type)),
    }


def _plain(value: Any) -> Any:
    """Intervals as mappings; infinite ends as null, which JSON has no number for."""
    if isinstance(value, Interval):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(measure: Measure, rows: list[Row]) -> list[str]:
    """Markdown, the best method first."""
    chief, *others = measure.figures
    heads = [
        *("method", "rate", chief.title, "over rows", *(figure.title for figure in others)),
        *(f"against full{', points' if chief.percent else ''}", "trained", "tokens/s", "peak MiB", "s", "seeds"),
    ]
    sign = -1 if chief.better == "higher" else 1
    ranked = sorted(rows, key=lambda row: sign * row.figures[chief.name].value if row.figures else math.inf)
    return [_cells(heads), "|---" * len(heads) + "|", *(_line(measure, row) for row in ranked)]


def _line(measure: Measure, row: Row) -> str:
    chief, *others = measure.figures
    rate = "" if row.rate is None else f"{row.rate:g}"
    if row.rows is None:
        return _cells([row.title, rate, "failed" if row.failed else "not yet", *[""] * (6 + len(others)), "0"])
    return _cells(
        [
            *(row.title, rate, _with_interval(chief, row.figures[chief.name])),
            f"{chief.formatted(row.rows.low)} to {chief.formatted(row.rows.high)}",
            *(_with_interval(figure, row.figures[figure.name]) for figure in others),
            "" if row.difference is None else _with_interval(chief, row.difference, sign="+"),
            f"{row.trainable:,} ({100 * row.trainable / row.parameters:.3g} %)",
            "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            *(f"{row.peak_mib:,.0f}", f"{row.seconds:.0f}", str(row.seeds)),
        ]
    )


def _cells(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _with_interval(figure: Figure, interval: Interval, sign: str = "") -> str:
    half = interval.high - interval.value
    return figure.formatted(interval.value, sign) + (f" ± {figure.formatted(half)}" if math.isfinite(half) else "")


def _left(found: Comparison) -> list[str]:
    if not found.missing:
        return []
    return ["", f"**Incomplete**: no time was left for at least {found.missing} trials; `--resume` goes on."]


def report(found: Comparison, rows: list[Row]) -> str:
    """Markdown."""
    config, splits, options = found.config, found.splits, found.options
    training, chief = config.training, found.measure.chief
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    lines = [
        f"# Methods compared on {Path(config.data.path).name}",
        *_left(found),
        "",
        f"`{Path(config.model.name).name}`, {training.max_steps} steps of {batch} rows, at most "
        f"{config.data.max_length} tokens a row; {len(splits.train)} rows to learn from, {len(splits.validation)} of "
        f"validation, {len(splits.test)} of test. {splits.exact} repeated rows and {splits.near} nearly repeated ones "
        f"(similarity from {options.similarity:g}) were left out first, {splits.ambiguous} of them with another label "
        "or answer than the row that stayed.",
        "",
        *table(found.measure, rows),
        "",
        f"![{chief.name} over trained parameters]({FIGURE})",
        "",
        "Figures are means over seeds, with Student's 95 % interval: what other seeds would give on these rows. *Over "
        f"rows* is the bootstrap of the mean over the test rows, of {chief.name}: what other rows would give. Neither "
        "contains the other's. *Against full* is the difference to full fine-tuning with the same seed and the same "
        f"batches. No interval is corrected for how many there are.{_baseline(found.measure)}",
        "",
        "tokens/s and peak memory are medians over the tests, which ran one after the other, seed by seed"
        + (", with what fastpeft accelerates." if config.acceleration.enabled else ", in plain PEFT.")
        + " Whatever else the machine did is in them. s: seconds of a whole trial, loading and testing included.",
    ]
    notes = [f"- {row.title}: {row.failed or row.note}" for row in rows if row.failed or row.note]
    lines += ["", "## What should be looked at", "", *notes] if notes else []
    lines += ["", "## The search for learning rates", "", *_searched(found)]
    lines += ["", "## What each method trains, beside the classifier", ""]
    lines += [f"- {row.title}: {METHODS[row.method].trains}" for row in rows]
    where = environment(pick_device().type)
    versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
    lines += ["", "## Environment", "", f"{where.device}, {where.system}, Python {where.python}: {versions}."]
    return "\n".join(lines) + "\n"


def _baseline(measure: Measure) -> str:
    value = measure.baseline()
    if value is None:
        return ""
    return f" With {measure.against}, {measure.chief.title} would be {measure.chief.formatted(value)}."


def _searched(found: Comparison) -> list[str]:
    """The first figure on validation for each rate, lowest to highest."""
    chief = found.measure.chief
    results = {one["key"]: one for one in found.results}
    trials = searches(found.options, found.config.training.seed)
    lines = [
        f"{chief.title} on the validation rows with seed {found.config.training.seed}, which no test uses.",
        "",
        "| method | " + " | ".join(f"rate {number}" for number in range(1, found.options.rates + 1)) + " |",
        "|---|" + "---|" * found.options.rates,
    ]
    for name in found.options.methods or list(METHODS):
        cells = []
        for rate in rates_of(name, found.options):
            key = next(trial.key for trial in trials if trial.method == name and trial.rate == rate)
            one = results.get(key)
            value = None if one is None or one["failed"] else one["figures"][chief.name]
            figure = "not yet" if one is None else "failed" if value is None else chief.formatted(value)
            cells.append(f"{rate:g}: {figure}")
        lines.append(f"| {METHODS[name].title} | " + " | ".join(cells) + " |")
    return lines


def plot(measure: Measure, rows: list[Row], path: Path) -> None:
    """The first figure with its interval over seeds, over the number of trained parameters."""
    chief, scale = measure.chief, 100 if measure.chief.percent else 1
    figure = require("train", "matplotlib.figure", "the figure").Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(row for row in rows if row.figures):
        value, _, high = row.figures[chief.name]
        axes.errorbar(
            row.trainable,
            scale * value,
            yerr=scale * (high - value) if math.isfinite(high) else None,
            fmt="o",
            color=f"C{place % 10}",
            capsize=3,
        )
        offset = (6, 5) if place % 2 else (6, -11)
        axes.annotate(row.title, (row.trainable, scale * value), xytext=offset, textcoords="offset points", fontsize=8)
    if (baseline := measure.baseline()) is not None:
        height = scale * baseline
        axes.axhline(height, linestyle="--", color="grey", linewidth=1)
        axes.text(0.01, height, measure.against, transform=axes.get_yaxis_transform(), fontsize=8, va="bottom")
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(f"{chief.title}, on the test rows")
    axes.grid(alpha=0.3)
    axes.margins(x=0.15)
    figure.savefig(path, metadata={"Date": None})
