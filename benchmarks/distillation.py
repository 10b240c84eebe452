"""`python -m benchmarks.distillation`: tables and figure of docs/strategies/distillation.md, of half a story writer.

`--run MODEL FOLDER` trains what is not recorded yet; MODEL is a decoder's folder, its stories and runs are in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.drawing import intervals
from benchmarks.trials import FIGURES, RESULTS, ROOT, Record, fill, options_of, read, row, said, train
from fastpeft.bench.tables import insert

TRIALS, STEPS = RESULTS / "distillation-stories15m.json", RESULTS / "distillation-stories15m-steps.json"
PAGE, FIGURE = ROOT / "docs/strategies/distillation.md", FIGURES / "distillation-stories15m.svg"
SEEDS, STORIES, HELD_BACK, LENGTH = (0, 1, 2), 288, 32, 64
"""Of the runs; stories, those of them that are not learned, and tokens of each."""
HALF: Record = {"student_layers": 2}
WAYS = {"divergence and labels": 0.5, "labels alone": None}
"""`labels_weight`; None for the task strategy on the same student."""
GIVEN = ("teacher", "student before")
FIGURES_OF = {"loss": "loss per token", "divergence": "divergence from the teacher, nats a token"}
SETTINGS: Record = {
    "max-length": 32,
    "batch-size": 8,
    "max-steps": 32,
    "learning-rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "lora.r": 64,
    "lora.alpha": 64,
    "report-to": "none",
}
PEERS = {"fastpeft": True, "plain PyTorch": False}
"""`acceleration.enabled` of the measured steps."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__)
    parser.add_argument("--run", nargs=2, type=Path, metavar=("MODEL", "FOLDER"))
    options = parser.parse_args(arguments)
    if options.run:
        model, folder = options.run
        torch.set_num_threads(1)
        prepare(model, folder)
        cases = [{"way": way} for way in GIVEN] + [{"way": way, "seed": seed} for seed in SEEDS for way in WAYS]
        fill(TRIALS, cases, partial(_trial, model, folder))
        fill(STEPS, [{"rows": 16, "tokens": LENGTH}], partial(_steps, model, folder))
    trials, steps = read(TRIALS), read(STEPS)
    text = insert(PAGE.read_text(encoding="utf-8"), table(trials), "distillation")
    PAGE.write_text(insert(text, step_table(steps), "distillation-step"), encoding="utf-8")
    figure(trials, FIGURE)


def prepare(model: Path, folder: Path) -> None:
    """The student, and what the model writes at temperature 1, unless they are there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastpeft.config import ModelSection
    from fastpeft.strategies.distillation import student

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    section = ModelSection(name=str(model))
    student.make(section, "causal-lm", HALF["student_layers"], folder / "student", tokenizer, 0, may_replace=True)
    if (folder / "stories.jsonl").is_file():
        return
    torch.manual_seed(0)
    writer = AutoModelForCausalLM.from_pretrained(model).float()
    begin = torch.full((STORIES // 3, 1), tokenizer.bos_token_id)
    told: list[str] = []
    for _ in range(3):
        ids = writer.generate(begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, max_length=LENGTH)
        told += tokenizer.batch_decode(ids, skip_special_tokens=True)
    for name, part in (("held-back", told[:HELD_BACK]), ("stories", told[HELD_BACK:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in part))


def table(trials: Sequence[Record]) -> str:
    """A row of each figure, a column of each way."""
    ours, theirs = WAYS
    columns = [*GIVEN, *WAYS, f"{ours} - {theirs}, seed by seed"]
    lines = [row(f"{HELD_BACK} stories held back", columns), "|---" * (len(columns) + 1) + "|"]
    for name, title in FIGURES_OF.items():
        each = {way: _figures(trials, way, name) for way in (*GIVEN, *WAYS)}
        cells = [f"{each[way][0]:.3f}" for way in GIVEN] + [said(each[way], 3) for way in WAYS]
        less = [a - b for a, b in zip(each[ours], each[theirs], strict=True)]
        lines.append(row(title, [*cells, said(less, 3, "+")]))
    values = [f"{_figures(trials, way, 'parameters')[0]:,}" for way in (*GIVEN, *WAYS)]
    lines.append(row("parameters, adapter included", [*values, ""]))
    seconds = [f"{median(_figures(trials, way, 'seconds')):.0f}" for way in WAYS]
    return "\n".join([*lines, row("processor time of the run and of judging it, s", ["", "", *seconds, ""])])


def step_table(steps: Sequence[Record]) -> str:
    """Memory and time of a step, accelerated and plain."""
    (step,) = steps
    (ours, theirs), title = (step[peer] for peer in PEERS), "a step of {rows} rows of {tokens} tokens".format(**step)
    peaks = [peer["peak MiB"] for peer in (ours, theirs)]
    ratio = median(a / b for a, b in zip(ours["ms"], theirs["ms"], strict=True))
    times = [f"{median(peer['ms']) / 1e3:.2f}" for peer in (ours, theirs)]
    return "\n".join(
        [
            row(title, [*PEERS, "fastpeft / plain"]),
            "|---|---|---|---|",
            row("peak beside both models, MiB", [*(f"{peak:,.0f}" for peak in peaks), f"{peaks[0] / peaks[1]:.2f}"]),
            row("processor time, s", [*times, f"{ratio:.2f}"]),
            row("loss", [f"{ours['loss']:.5f}", f"{theirs['loss']:.5f}", ""]),
        ]
    )


def figure(trials: Sequence[Record], path: Path) -> None:
    """Both figures of each way with their intervals over the seeds."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 4), layout="constrained")
    for axes, (name, title) in zip(drawn.subplots(1, 2), FIGURES_OF.items(), strict=True):
        intervals(axes, ["half the layers"], {way: [_figures(trials, way, name)] for way in WAYS}, title)
    drawn.savefig(path, metadata={"Date": None})


def _figures(trials: Sequence[Record], way: str, name: str) -> list[float]:
    """Of the way's runs, seed by seed."""
    return [trial[name] for trial in trials if trial["way"] == way]


def _trial(model: Path, folder: Path, case: Record) -> Record:
    """What a run, or a model as it is, makes of the stories that are held back."""
    if case["way"] in GIVEN:
        return _judge(model, folder)(model if case["way"] == "teacher" else folder / "student")
    weight = WAYS[case["way"]]
    settings = SETTINGS | {"seed": case["seed"], "data.eval-path": folder / "held-back.jsonl"}
    if weight is not None:
        options = json.dumps(HALF | {"labels_weight": weight})
        settings |= {"strategy.name": "distillation", "strategy.options": options}
    begun, place = time.process_time(), folder / f"{case['way'].replace(' ', '-')}-{case['seed']}"
    source = folder / "student" if weight is None else model
    train(place, ["--model", str(source), "--data", str(folder / "stories.jsonl"), *options_of(settings)])
    return _judge(model, folder)(place) | {"seconds": round(time.process_time() - begun, 1)}


@cache
def _judge(model: Path, folder: Path) -> Callable[[Path], Record]:
    """Gives a run's or a checkpoint's loss and divergence, means over tokens held back, and its number of values."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastpeft.models import tuned
    from fastpeft_kernels.loss import kl_divergence

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [json.loads(line)["text"] for line in (folder / "held-back.jsonl").read_text().splitlines()]
    rows = [tokenizer(text, return_tensors="pt").input_ids[:, : SETTINGS["max-length"]] for text in texts]
    teacher = AutoModelForCausalLM.from_pretrained(model).float().eval()

    @torch.no_grad()
    def judged(place: Path) -> Record:
        if (place / "adapter_config.json").is_file():
            asked: Any = tuned.load(tuned.find(str(place)), torch.device("cpu"), torch.float32)
        else:
            asked = AutoModelForCausalLM.from_pretrained(place).float()
        asked.eval()
        loss = apart = 0.0
        for ids in rows:
            ours, theirs = (each(input_ids=ids).logits[0, :-1] for each in (asked, teacher))
            loss += float(torch.nn.functional.cross_entropy(ours, ids[0, 1:], reduction="sum"))
            apart += float(kl_divergence(ours, theirs, reduction="sum"))
        tokens = sum(ids.shape[1] - 1 for ids in rows)
        values = sum(parameter.numel() for parameter in asked.parameters())
        return {"loss": loss / tokens, "divergence": apart / tokens, "parameters": values}

    return judged


def _steps(model: Path, folder: Path, case: Record) -> Record:
    """Loss, peak and processor time of a forward and a backward, accelerated and plain in turn."""
    from fastpeft.bench.dynamic import processor_ms
    from fastpeft.bench.memory import MIB, peak_of_step
    from fastpeft.bench.timer import interleaved

    steps = {peer: _step(model, folder, case, enabled) for peer, enabled in PEERS.items()}
    found: Record = {peer: {"loss": float(step())} for peer, step in steps.items()}
    for peer, step in steps.items():
        found[peer]["peak MiB"] = peak_of_step(step, "cpu") / MIB
    times = interleaved(steps, rounds=5, warmup=1, clock=processor_ms)
    return found | {peer: found[peer] | {"ms": times[peer]} for peer in steps}


def _step(model: Path, folder: Path, case: Record, accelerated: bool) -> Callable[[], torch.Tensor]:
    from rich.console import Console

    from fastpeft.config import FastpeftConfig
    from fastpeft.strategies.run import check_run

    config = FastpeftConfig.from_dict(
        {
            "model": {"name": str(model)},
            "data": {"path": str(folder / "stories.jsonl"), "max_length": case["tokens"]},
            "lora": {"r": SETTINGS["lora.r"], "alpha": SETTINGS["lora.alpha"], "dropout": 0.0},
            "training": {
                "per_device_train_batch_size": case["rows"],
                "output_dir": str(folder / f"step-{accelerated}"),
            },
            "strategy": {"name": "distillation", "options": HALF},
            "acceleration": {"enabled": accelerated},
        }
    )
    ready, quiet = check_run(config, Console(quiet=True), overwrite=True), Console(quiet=True)
    arguments = ready.strategy.settle(ready.prepared, ready.arguments, None, quiet)
    loaded = ready.strategy.load(ready.prepared, torch.device("cpu"), torch.float32)
    trainer = ready.strategy.trainer(ready.prepared, loaded, arguments, [])
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))

    def step() -> torch.Tensor:
        loaded.zero_grad()
        loss: torch.Tensor = trainer.training_step(loaded, dict(batch))
        return loss

    return step


if __name__ == "__main__":
    main()
