"""`python -m benchmarks.dynamic`: table and figure of docs/strategies/dynamic.md from trials beside a static run.

`--run MODEL NOVELS` trains what is not recorded yet, before: a small story writer, on a novel.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

from benchmarks.trials import FIGURES, RESULTS, ROOT, Record, fill, read, row, said, train, where, write
from fastpeft.bench.tables import insert
from fastpeft.metrics.intervals import over_seeds

TRIALS, STEPS = RESULTS / "dynamic-stories15m.json", RESULTS / "dynamic-stories15m-steps.json"
PAGE, FIGURE = ROOT / "docs/strategies/dynamic.md", FIGURES / "dynamic-stories15m.svg"
BOOK, CHARACTERS = "[Emma by Jane Austen 1816]", 40_000
SEEDS, COUNT, ROWS, TOKENS, RANK = (0, 1, 2), 30, 2, 64, 8
RULES: dict[str, Record] = {
    "sample": {"action": "sample", "layers": 2, "every": 10},
    "freeze": {"action": "freeze", "below": 0.6, "order": "any", "start": 10, "every": 5},
    "schedule": {
        "action": "schedule",
        "stages": [{"at": 0, "trained": [-1]}, {"at": 10, "trained": [-1, -2, -3]}, {"at": 20, "trained": "all"}],
    },
    "ranks": {"action": "ranks", "budget": 168, "start": 10, "end": 25, "every": 5},
    "dylora": {"action": "dylora"},
    "reweight": {"action": "reweight"},
}
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dynamic", description=__doc__)
    given = {"metavar": ("MODEL", "NOVELS"), "help": f"a decoder's folder, and a file of texts with {BOOK}"}
    parser.add_argument("--run", nargs=2, **given)
    options = parser.parse_args(arguments)
    if options.run:
        model, novels = options.run
        with TemporaryDirectory() as folder:
            text = Path(folder) / "emma.txt"
            text.write_text(Path(novels).read_text(encoding="utf-8").partition(BOOK)[2].strip()[:CHARACTERS], "utf-8")
            cases = [{"rule": name, "seed": seed} for seed in SEEDS for name in RULES]
            found = fill(TRIALS, cases, partial(trial, model, text))
        write(STEPS, measured_steps(model, found))
    found, steps = read(TRIALS), read(STEPS)
    page = insert(PAGE.read_text(encoding="utf-8"), table(found, steps), "dynamic")
    PAGE.write_text(insert(page, ranks_table(found), "dynamic-ranks"), encoding="utf-8")
    figure(found, steps, FIGURE)


HEAD = ("rule", "nats a token, held out", "less static's, seed by seed", "trained values, of static's")
HEAD += ("gradients, MiB", "optimizer state, MiB", "kept for backward, MiB", "time of a step, of static's")


def table(found: Sequence[Record], steps: Sequence[Record]) -> str:
    """A row for each rule, the static run first; means over the steps and the seeds."""
    static = _static(found)
    first, *others = HEAD
    lines = [row(first, others), "|---" * len(HEAD) + "|", row("none (static)", _cells(static, static, steps))]
    return "\n".join([*lines, *(row(f"`{name}`", _cells(_of(found, name), static, steps)) for name in _names(found))])


def ranks_table(found: Sequence[Record]) -> str:
    """What the reports of "dylora" say of each rank, a column for each seed."""
    mine = _of(found, "dylora")
    lines = [row("rank", [f"seed {trial['seed']}" for trial in mine]), "|---" * (len(mine) + 1) + "|"]
    for reported in zip(*(trial["by rank"][0].splitlines()[2:] for trial in mine), strict=True):
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in reported]
        lines.append(row(cells[0][0], [f"{loss} ({interval})" for _, loss, interval in cells]))
    return "\n".join(lines)


def figure(found: Sequence[Record], steps: Sequence[Record], path: Path) -> None:
    """How much worse than static each rule is, and what is left of static's memory."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 4), layout="constrained")
    loss, memory = drawn.subplots(1, 2, sharey=True)
    names, static = _names(found), _static(found)
    for place, name in enumerate(names):
        mine = _of(found, name)
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
    drawn.legend(*memory.get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8)
    drawn.savefig(path, metadata={"Date": None})


def trial(model: str, text: Path, case: Record) -> Record:
    """A run under one rule; the first rule's has the static run of its seed beside it."""
    beside = case["rule"] == next(iter(RULES))
    strategy = json.dumps({"rules": [RULES[case["rule"]]], "static": beside, "before": beside})
    given = ("--model", model, "--data", str(text), "--data.eval-fraction", "0.12", "--max-length", str(TOKENS))
    given += ("--batch-size", str(ROWS), "--training.per-device-eval-batch-size", "8", "--report-to", "none")
    given += ("--max-steps", str(COUNT), "--save-steps", str(COUNT), "--learning-rate", "1e-3")
    given += ("--seed", str(case["seed"]), "--lora.r", str(RANK), "--lora.alpha", str(2 * RANK))
    with TemporaryDirectory() as folder:
        place = Path(folder) / "run"
        run = train(place, [*given, "--strategy.name", "dynamic", "--strategy.options", strategy])
        costs = json.loads((place / "costs.json").read_text(encoding="utf-8"))
        state = json.loads((place / f"checkpoint-{COUNT}/trainer_state.json").read_text(encoding="utf-8"))
    metrics = {metric["name"]: metric for metric in run["findings"]["metrics"]}
    loss = metrics["loss per token"]
    found: Record = {"loss": loss["value"], "rows": loss["rows"], "costs": costs["dynamic"]}
    found["trained"] = state["stateful_callbacks"]["Controller"]["attributes"]["trained"]
    if beside:
        found["static loss"] = loss["value"] - metrics["loss per token: dynamic less static"]["value"]
        found |= {"static costs": costs["static"], "loss before": loss["baseline"]}
    found["by rank"] = [part["text"] for part in run["findings"]["sections"] if part["title"] == "By rank"]
    return found


def measured_steps(model: str, found: Sequence[Record]) -> list[Record]:
    """Of each set of layers that was trained: bytes kept for backward, and processor time of steps, in turn."""
    import torch

    from fastpeft.bench.dynamic import batch_of, model_of, own_loss, processor_ms
    from fastpeft.bench.kept import bytes_kept
    from fastpeft.bench.timer import interleaved
    from fastpeft.strategies.dynamic.trained import Trained

    peft, batch = model_of(model, RANK, "cpu"), batch_of(ROWS, TOKENS, "cpu")
    optimizer = torch.optim.AdamW([each for each in peft.parameters() if each.requires_grad], lr=1e-4)
    trained = Trained(peft)
    sets = sorted({tuple(trained.layers), *(tuple(layers) for one in found for layers in one["trained"].values())})

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
        records.append({"layers": list(layers), "kept": kept, "ms": times[str(layers)]})
    return [record | {"where": where()} for record in records]


def _names(found: Sequence[Record]) -> list[str]:
    return [name for name in RULES if _of(found, name)]


def _of(found: Sequence[Record], rule: str) -> list[Record]:
    return [trial for trial in found if trial["rule"] == rule]


def _static(found: Sequence[Record]) -> list[Record]:
    """The static runs, as trials in which nothing was decided."""
    begun = [trial for trial in found if "static loss" in trial]
    return [trial | {"loss": trial["static loss"], "costs": trial["static costs"], "trained": None} for trial in begun]


def _cells(mine: Sequence[Record], static: Sequence[Record], steps: Sequence[Record]) -> list[str]:
    kept, time = (_over_steps(mine, steps, figure) for figure in (_kept, _time))
    return [
        said([trial["loss"] for trial in mine], 3),
        "" if mine is static else said(_differences(mine, static), 3, "+"),
        f"{100 * _mean(mine, 'trained') / _mean(static, 'trained'):.0f} %",
        *(f"{_mean(mine, name) / MIB:.2f}" for name in ("gradient_bytes", "optimizer_bytes")),
        "-" if kept is None else f"{kept / MIB:.1f}",
        "-" if time is None else f"{time:.2f}",
    ]


def _differences(mine: Sequence[Record], static: Sequence[Record]) -> list[float]:
    losses = {trial["seed"]: trial["loss"] for trial in static}
    return [trial["loss"] - losses[trial["seed"]] for trial in mine]


def _shares(mine: Sequence[Record], static: Sequence[Record], steps: Sequence[Record]) -> dict[str, float]:
    costs = {"gradients": "gradient_bytes", "optimizer state": "optimizer_bytes"}
    found = {label: _mean(mine, name) / _mean(static, name) for label, name in costs.items()}
    kept, whole = (_over_steps(each, steps, _kept) for each in (mine, static))
    return found if kept is None or whole is None else found | {"kept for backward": kept / whole}


def _mean(mine: Sequence[Record], name: str) -> float:
    return fmean(trial["costs"][name] for trial in mine)


def _kept(step: Record, whole: Record) -> float:
    return float(step["kept"])


def _time(step: Record, whole: Record) -> float:
    return median(one / other for one, other in zip(step["ms"], whole["ms"], strict=True))


def _over_steps(
    mine: Sequence[Record], steps: Sequence[Record], figure: Callable[[Record, Record], float]
) -> float | None:
    """Mean over the steps of all trials; None for rules that choose no layers, whose steps were not measured."""
    by_layers = {tuple(step["layers"]): step for step in steps}
    whole = by_layers[max(by_layers, key=len)]
    if mine[0]["trained"] is None:
        return figure(whole, whole)
    if RULES[mine[0]["rule"]]["action"] not in ("sample", "freeze", "schedule"):
        return None
    values = []
    for trial in mine:
        begun = sorted((int(step), tuple(layers)) for step, layers in trial["trained"].items())
        for (step, layers), (end, _) in pairwise([*begun, (COUNT, ())]):
            values += [figure(by_layers[layers], whole)] * (end - step)
    return fmean(values)


if __name__ == "__main__":
    main()
