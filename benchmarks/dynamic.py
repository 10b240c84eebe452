"""`python -m benchmarks.dynamic`: table and figure of docs/strategies/dynamic.md from trials beside a static run.

`--run MODEL NOVELS` trains what is not recorded yet; MODEL is a decoder's folder, NOVELS a file with Emma in it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.trials import FIGURES, RESULTS, ROOT, Record, fill, read, row, said, train, where, write
from fastpeft.bench.tables import insert
from fastpeft.metrics.intervals import over_seeds

TRIALS, STEPS = RESULTS / "dynamic-stories15m.json", RESULTS / "dynamic-stories15m-steps.json"
PAGE, FIGURE = ROOT / "docs/strategies/dynamic.md", FIGURES / "dynamic-stories15m.svg"
BOOK, CHARACTERS = "[Emma by Jane Austen 1816]", 60_000
SEEDS, COUNT, ROWS, TOKENS, RANK = (0, 1, 2), 40, 4, 64, 8
RULES: dict[str, Record] = {
    "sample": {"action": "sample", "layers": 2, "every": 10},
    "freeze, any": {"action": "freeze", "below": 0.6, "order": "any", "start": 10, "every": 5},
    "freeze, bottom": {"action": "freeze", "against": "own", "below": 0.7, "start": 10, "every": 5},
    "schedule": {
        "action": "schedule",
        "stages": [{"at": 0, "trained": [-1]}, {"at": 10, "trained": [-1, -2, -3]}, {"at": 20, "trained": "all"}],
    },
    "ranks": {"action": "ranks", "budget": 168, "start": 10, "end": 30, "every": 5},
    "dylora": {"action": "dylora"},
    "pace": {"action": "pace", "until": 30, "every": 10},
    "reweight": {"action": "reweight"},
    "reweight, anchored": {"action": "reweight", "anchor": 0.1},
}
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dynamic", description=__doc__)
    parser.add_argument("--run", nargs=2, type=Path, metavar=("MODEL", "NOVELS"))
    options = parser.parse_args(arguments)
    if options.run:
        model, novels = options.run
        with TemporaryDirectory() as folder:
            text = Path(folder) / "emma.txt"
            text.write_text(novels.read_text(encoding="utf-8").partition(BOOK)[2].strip()[:CHARACTERS], "utf-8")
            cases = [{"rule": name, "seed": seed} for seed in SEEDS for name in RULES]
            fill(TRIALS, cases, partial(_trial, model, text))
        _measure_steps(model)
    trials, steps = read(TRIALS), read(STEPS)
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), table(trials, steps), "dynamic"), encoding="utf-8")
    figure(trials, steps, FIGURE)


def table(trials: Sequence[Record], steps: Sequence[Record]) -> str:
    """A row for each rule, the static run first."""
    lines = [
        row(
            "rule",
            ("nats a token, held out", "less static's, seed by seed", "trained values", "gradients, MiB")
            + ("optimizer state, MiB", "kept for backward, MiB", "time of a step, of static's"),
        ),
        "|---" * 8 + "|",
        row("none (static)", _cells(_static(trials), steps, _static(trials))),
    ]
    names = [name for name in RULES if any(trial["rule"] == name for trial in trials)]
    return "\n".join([*lines, *(row(f"`{name}`", _cells(_of(trials, name), steps, _static(trials))) for name in names)])


def figure(trials: Sequence[Record], steps: Sequence[Record], path: Path) -> None:
    """How much worse than static each rule is, and what is left of static's memory."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 4), layout="constrained")
    loss, memory = drawn.subplots(1, 2, sharey=True)
    names = [name for name in RULES if any(trial["rule"] == name for trial in trials)]
    static = _static(trials)
    for place, name in enumerate(names):
        mine = _of(trials, name)
        mean, low, high = over_seeds(_differences(mine, static))
        loss.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, color="C0")
        for number, (label, share) in enumerate(_shares(mine, static, steps).items()):
            at = place + 0.25 * (number - 1)
            memory.barh(at, 100 * share, 0.22, color=f"C{number + 1}", label=label if place == 0 else None)
    loss.axvline(0, color="black", linewidth=0.8)
    loss.set_xscale("symlog", linthresh=0.1)
    loss.set_xlabel("nats a token more than static (log beyond 0.1)")
    loss.set_yticks(range(len(names)), names)
    loss.invert_yaxis()
    loss.grid(axis="x", alpha=0.3)
    memory.set_xlabel("% of static's, mean of the steps")
    memory.legend(fontsize=8)
    drawn.savefig(path, metadata={"Date": None})


def _trial(model: Path, text: Path, case: Record) -> Record:
    """A run under one rule; the first rule's has the static run of its seed beside it."""
    beside = case["rule"] == next(iter(RULES))
    strategy = {"rules": [RULES[case["rule"]]], "static": beside, "before": beside}
    settings: dict[str, Any] = {
        "data.eval-fraction": 0.1,
        "max-length": TOKENS,
        "batch-size": ROWS,
        "training.per-device-eval-batch-size": 8,
        "max-steps": COUNT,
        "save-steps": COUNT,
        "learning-rate": 1e-3,
        "lora.r": RANK,
        "lora.alpha": 2 * RANK,
        "seed": case["seed"],
        "report-to": "none",
        "strategy.name": "dynamic",
        "strategy.options": json.dumps(strategy),
    }
    given = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    with TemporaryDirectory() as folder:
        run = train(Path(folder) / "run", ["--model", str(model), "--data", str(text), *given])
        costs = json.loads((Path(folder) / "run/costs.json").read_text(encoding="utf-8"))
        state = json.loads((Path(folder) / f"run/checkpoint-{COUNT}/trainer_state.json").read_text(encoding="utf-8"))
    metrics = {metric["name"]: metric for metric in run["findings"]["metrics"]}
    loss = metrics["loss per token"]
    found: Record = {"loss": loss["value"], "rows": loss["rows"], "costs": costs["dynamic"]}
    found["trained"] = state["stateful_callbacks"]["Controller"]["attributes"]["trained"]
    if beside:
        found["static loss"] = loss["value"] - metrics["loss per token: dynamic less static"]["value"]
        found |= {"static costs": costs["static"], "loss before": loss["baseline"]}
    return found


def _measure_steps(model: Path) -> None:
    """Of each set of layers that was trained: what is kept for backward, and the processor time of a step."""
    import torch

    from fastpeft.bench.dynamic import batch_of, model_of, own_loss, processor_ms
    from fastpeft.bench.kept import bytes_kept
    from fastpeft.bench.timer import interleaved
    from fastpeft.strategies.dynamic.trained import Trained

    trials = read(TRIALS)
    sets = sorted({tuple(layers) for trial in trials for layers in trial["trained"].values()})
    if sets == [tuple(step["layers"]) for step in read(STEPS)]:
        return
    peft, batch = model_of(str(model), RANK, "cpu"), batch_of(ROWS, TOKENS, "cpu")
    optimizer = torch.optim.AdamW([each for each in peft.parameters() if each.requires_grad], lr=1e-4)
    trained = Trained(peft)

    def step(layers: tuple[int, ...]) -> None:
        trained.only(layers, optimizer)
        own_loss(peft, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    times = interleaved({str(layers): partial(step, layers) for layers in sets}, 7, 1, "cpu", processor_ms)
    records = []
    for layers in sets:
        trained.only(layers, optimizer)
        kept = bytes_kept(peft, partial(own_loss, peft, batch))
        records.append({"layers": list(layers), "kept": kept, "ms": times[str(layers)], "where": where()})
    write(STEPS, records)


def _of(trials: Sequence[Record], rule: str) -> list[Record]:
    return [trial for trial in trials if trial["rule"] == rule]


def _static(trials: Sequence[Record]) -> list[Record]:
    """The static runs, as trials."""
    return [
        {"seed": trial["seed"], "loss": trial["static loss"], "costs": trial["static costs"], "trained": None}
        for trial in trials
        if "static loss" in trial
    ]


def _differences(mine: Sequence[Record], static: Sequence[Record]) -> list[float]:
    losses = {trial["seed"]: trial["loss"] for trial in static}
    return [trial["loss"] - losses[trial["seed"]] for trial in mine]


def _cells(mine: Sequence[Record], steps: Sequence[Record], static: Sequence[Record]) -> list[str]:
    kept, time = (_over_steps(mine, steps, figure) for figure in (_kept, _time))
    cells = [said([trial["loss"] for trial in mine], 3)]
    cells.append("" if mine == static else said(_differences(mine, static), 3, "+"))
    cells.append(f"{_mean(mine, 'trained'):,.0f}")
    cells += [f"{_mean(mine, name) / MIB:.2f}" for name in ("gradient_bytes", "optimizer_bytes")]
    return [*cells, "-" if kept is None else f"{kept / MIB:.1f}", "-" if time is None else f"{time:.2f}"]


def _shares(mine: Sequence[Record], static: Sequence[Record], steps: Sequence[Record]) -> dict[str, float]:
    found = {
        "gradients": _mean(mine, "gradient_bytes") / _mean(static, "gradient_bytes"),
        "optimizer state": _mean(mine, "optimizer_bytes") / _mean(static, "optimizer_bytes"),
    }
    kept, whole = (_over_steps(trials, steps, _kept) for trials in (mine, static))
    return found if kept is None or whole is None else found | {"kept for backward": kept / whole}


def _mean(trials: Sequence[Record], name: str) -> float:
    return fmean(trial["costs"][name] for trial in trials)


def _kept(step: Record, whole: Record) -> float:
    return float(step["kept"])


def _time(step: Record, whole: Record) -> float:
    return median(one / other for one, other in zip(step["ms"], whole["ms"], strict=True))


def _over_steps(trials: Sequence[Record], steps: Sequence[Record], figure: Any) -> float | None:
    """Mean over the steps of all trials; None for rules that choose no layers, whose steps were not measured."""
    by_layers = {tuple(step["layers"]): step for step in steps}
    whole = by_layers[max(by_layers, key=len)]
    if all(trial["trained"] is None for trial in trials):
        return float(figure(whole, whole))
    if all(len(trial["trained"]) == 1 for trial in trials):
        return None
    values = []
    for trial in trials:
        begun = sorted((int(step), tuple(layers)) for step, layers in trial["trained"].items())
        for (step, layers), (end, _) in pairwise([*begun, (COUNT, ())]):
            values += [figure(by_layers[layers], whole)] * (end - step)
    return fmean(values)


if __name__ == "__main__":
    main()
