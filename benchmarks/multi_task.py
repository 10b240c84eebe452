"""`python -m benchmarks.multi_task`: tables and figure of docs/strategies/multi-task.md, of news and film reviews.

`--run MODEL TEXTS FOLDER` trains what is not recorded yet; MODEL is a sentence encoder's folder, TEXTS has news.jsonl
and reviews.jsonl, the runs are in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch

from benchmarks.drawing import intervals
from benchmarks.trials import FIGURES, RESULTS, ROOT, Record, fill, options_of, read, row, said, train
from fastpeft.bench.tables import insert
from fastpeft.bench.tasks import measure

TRIALS, PASSES = RESULTS / "multi-task-minilm.json", RESULTS / "multi-task-passes.json"
PAGE, FIGURE = ROOT / "docs/strategies/multi-task.md", FIGURES / "multi-task-minilm.svg"
SEEDS, TASKS = (0, 1, 2), ("news", "reviews")
WAYS = {"shared": 8, "per-task": 8, "both": 4}
"""`adapters`, and `lora.r`: each task's adapter has rank 8 in all of them."""
FIRST = "shared"
"""The way whose runs train each task alone, too: the others' are the same."""
SETTINGS: Record = {
    "data.limit": 160,
    "data.eval-fraction": 0.4,
    "max-length": 32,
    "batch-size": 8,
    "learning-rate": 3e-3,
    "num-train-epochs": 1,
    "report-to": "none",
    "strategy.name": "multi-task",
}
SIZE: Record = {"hidden": 384, "layers": 6, "tasks": 2, "rows": 8, "tokens": 32}
"""Of the encoder that passes are measured on, which is MiniLM's, and of its step."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multi_task", description=__doc__)
    parser.add_argument("--run", nargs=3, type=Path, metavar=("MODEL", "TEXTS", "FOLDER"))
    options = parser.parse_args(arguments)
    if options.run:
        torch.set_num_threads(1)
        cases = [{"adapters": way, "seed": seed} for seed in SEEDS for way in WAYS]
        fill(TRIALS, cases, partial(_trial, *options.run))
        fill(PASSES, [SIZE], lambda size: {"ways": measure(**size, rounds=5)})
    trials, passes = read(TRIALS), read(PASSES)
    text = insert(PAGE.read_text(encoding="utf-8"), table(trials), "multi-task")
    PAGE.write_text(insert(text, pass_table(passes), "multi-task-passes"), encoding="utf-8")
    figure(trials, FIGURE)


def table(trials: Sequence[Record]) -> str:
    """Accuracies of each way, in percent, beside training alone."""
    alone = {task: _alone(trials, task) for task in TASKS}
    heads = [head for task in TASKS for head in (f"{task}, accuracy in %", "less alone, seed by seed")]
    lines = [row("`adapters`", [*heads, "cosine of the gradients"]), "|---" * (len(heads) + 2) + "|"]
    for way in WAYS:
        cells: list[str] = []
        for task in TASKS:
            ours = _accuracies(trials, way, task)
            less = [a - b for a, b in zip(ours, alone[task], strict=True)]
            cells += [said(ours), said(less, 1, "+")]
        cosines = [cosine for trial in _of(trials, way) for cosine in trial["cosines"]]
        below = sum(cosine < 0 for cosine in cosines)
        shown = f"{fmean(cosines):+.2f}, below 0 in {below} of {len(cosines)}" if cosines else "nothing is shared"
        lines.append(row(f"`{way}`", [*cells, shown]))
    chance = {task: said([100 * trial["chance"][task] for trial in _of(trials, FIRST)]) for task in TASKS}
    for name, values in (("alone", {task: said(alone[task]) for task in TASKS}), ("the most frequent class", chance)):
        lines.append(row(name, [*(cell for task in TASKS for cell in (values[task], "")), ""]))
    return "\n".join(lines)


def pass_table(passes: Sequence[Record]) -> str:
    """One pass over a mixed batch beside one pass a task."""
    (found,) = passes
    lines = [row("", ["one pass", "one pass a task", "time, one / a task"]), "|---|---|---|---|"]
    for peer in ("PEFT", "fastpeft"):
        one, each = (found["ways"][f"{peer}, {way}"] for way in ("one pass", "one pass a task"))
        ratio = median(a / b for a, b in zip(one["ms"], each["ms"], strict=True))
        lines.append(row(peer, [_said(one), _said(each), f"{ratio:.2f}"]))
    return "\n".join(lines)


def figure(trials: Sequence[Record], path: Path) -> None:
    """Accuracies of each way with their intervals over the seeds."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 4), layout="constrained")
    for axes, task in zip(drawn.subplots(1, 2), TASKS, strict=True):
        ways = {way: [_accuracies(trials, way, task)] for way in WAYS}
        intervals(axes, [task], {**ways, "alone": [_alone(trials, task)]}, "accuracy, %")
    drawn.savefig(path, metadata={"Date": None})


def _of(trials: Sequence[Record], way: str) -> list[Record]:
    return [trial for trial in trials if trial["adapters"] == way]


def _accuracies(trials: Sequence[Record], way: str, task: str) -> list[float]:
    """In percent, seed by seed."""
    return [100 * trial["accuracy"][task] for trial in _of(trials, way)]


def _alone(trials: Sequence[Record], task: str) -> list[float]:
    return [100 * trial["alone"][task] for trial in _of(trials, FIRST)]


def _said(way: Record) -> str:
    return f"{median(way['ms']):.0f} ms, {way['products']} products, peak {way['peak MiB']:.0f} MiB"


def _trial(model: Path, texts: Path, folder: Path, case: Record) -> Record:
    """Accuracies after a run, and the cosine of the tasks' gradients in each step."""
    adapters, seed = case["adapters"], case["seed"]
    first, rank = adapters == FIRST, WAYS[adapters]
    tasks = {task: {"path": str(texts / f"{task}.jsonl")} for task in TASKS}
    options = json.dumps({"tasks": tasks, "adapters": adapters, "alone": first, "conflict_steps": 1})
    settings = SETTINGS | {"lora.r": rank, "lora.alpha": 2 * rank, "seed": seed, "strategy.options": options}
    begun, place = time.process_time(), folder / f"{adapters}-{seed}"
    run = train(place, ["--model", str(model), *options_of(settings)])
    seconds = round(time.process_time() - begun, 1)
    metrics = {metric["name"]: metric for metric in run["findings"]["metrics"]}
    accuracy = {task: metrics[f"{task}: accuracy"]["value"] for task in TASKS}
    state = json.loads((place / f"checkpoint-{run['steps']}" / "tasks.json").read_text(encoding="utf-8"))
    cosines = [round(cosine, 4) for *_, cosine in state["memory"]["conflicts"]]
    found: Record = {"accuracy": accuracy, "steps": run["steps"], "seconds": seconds, "cosines": cosines}
    if first:
        found["alone"] = {task: accuracy[task] - metrics[f"{task}: accuracy, difference"]["value"] for task in TASKS}
        found["chance"] = {task: metrics[f"{task}: accuracy"]["baseline"] for task in TASKS}
    return found


if __name__ == "__main__":
    main()
