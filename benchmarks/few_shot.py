"""`python -m benchmarks.few_shot`: table and figure of docs/strategies/few-shot.md from the draws of its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.trials import FIGURES, RESULTS, ROOT, row, said
from fastpeft.bench.tables import insert
from fastpeft.metrics.intervals import over_seeds

DRAWS = RESULTS / "few-shot-minilm.json"
"""Of each run: data, shots, method, and what `few_shot_draws.json` of its folder has."""
PAGE, FIGURE = ROOT / "docs/strategies/few-shot.md", FIGURES / "few-shot-minilm.svg"
WAYS = {
    "`contrastive`": ("contrastive", "trained"),
    "`classifier`": ("classifier", "trained"),
    "prototypes, no training": ("contrastive", "prototypes"),
    "logistic regression, no training of the encoder": ("contrastive", "logistic regression alone"),
}
"""(method of the run, figure of each draw) by what the table says."""

Runs = dict[tuple[str, int, str], list[dict[str, Any]]]


def read() -> Runs:
    """Draws by (data, shots, method)."""
    runs = json.loads(DRAWS.read_text(encoding="utf-8"))
    return {(run["data"], run["shots"], run["method"]): run["draws"] for run in runs}


def accuracies(runs: Runs, data: str, shots: int, way: str) -> list[float]:
    """In percent, draw by draw."""
    method, figure = WAYS[way]
    return [100 * draw["figures"][figure]["accuracy"] for draw in runs.get((data, shots, method), ())]


def table(runs: Runs) -> str:
    """A row for each way, a column for each data set and number of shots."""
    columns = sorted({key[:2] for key in runs})
    lines = [f"| | {' | '.join(f'{data}, {shots} a class' for data, shots in columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    ours, theirs, *_ = WAYS
    for way in WAYS:
        lines.append(row(way, [said(accuracies(runs, *column, way)) for column in columns]))
    pairs = [[accuracies(runs, *column, way) for way in (ours, theirs)] for column in columns]
    cells = [said([a - b for a, b in zip(*pair, strict=True)], sign="+") if all(pair) else "-" for pair in pairs]
    return "\n".join([*lines, row(f"{ours} - {theirs}, draw by draw", cells)])


def figure(runs: Runs, path: Path) -> None:
    """Means with their intervals over the draws."""
    from matplotlib.figure import Figure

    columns = sorted({key[:2] for key in runs})
    drawn = Figure(figsize=(8, 4), layout="constrained")
    axes = drawn.subplots()
    for place, way in enumerate(WAYS):
        found = [(x, over_seeds(values)) for x, c in enumerate(columns) if (values := accuracies(runs, *c, way))]
        at = [x + 0.15 * (place - (len(WAYS) - 1) / 2) for x, _ in found]
        means = [interval.value for _, interval in found]
        reach = [[i.value - i.low for _, i in found], [i.high - i.value for _, i in found]]
        axes.errorbar(at, means, yerr=reach, fmt="o", capsize=3, label=way.replace("`", ""))
    axes.set_xticks(range(len(columns)), [f"{data}, {shots} a class" for data, shots in columns])
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    drawn.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), table(read()), "few-shot"), encoding="utf-8")
    figure(read(), FIGURE)
