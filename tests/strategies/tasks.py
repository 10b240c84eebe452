"""Two small tasks that can be learned, and a trainer over them without the command around it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from tests.checkpoints import SHIPPED, Checkpoints, write_rows
from tests.training.runs import Run, train

QUICK = shlex.split("--batch-size 8 --logging-steps 4 --lora.r 4 --report-to none --data.eval_fraction 0.25")
LEARNS = {"bert": ("1e-2", 24), "llama": ("1e-2", 16), "t5": ("3e-2", 30)}
"""Rate and steps at which each learns both tasks."""
KINDS = {"ends": ("za", ("no", "yes"), 32), "moods": ("kqx", ("sad", "glad", "mad"), 48)}
"""Letters that texts of a task begin with, the label of each, and how many rows."""


def rows(task: str) -> list[dict[str, Any]]:
    """Texts whose first letters tell the label."""
    letters, labels, count = KINDS[task]
    return [
        {"text": f"{letters[number % len(letters)] * 4} {number}", "label": labels[number % len(letters)]}
        for number in range(count)
    ]


def write(folder: Path, model: str) -> dict[str, dict[str, str]]:
    """`strategy.options.tasks`; prompts and completions for language models."""
    found = {}
    for task in KINDS:
        given = rows(task)
        if model != "bert":
            given = [{"prompt": row["text"], "completion": f" {row['label']}"} for row in given]
        found[task] = {"path": write_rows(folder / f"{task}.jsonl", *given)}
    return found


def run(folder: Path, checkpoints: Checkpoints, *more: str, model: str = "bert", code: int = 0, **options: Any) -> Run:
    """`fastpeft train` under multi-task; `options` are `strategy.options` beside the tasks."""
    return train(folder, *arguments(folder, checkpoints, *more, model=model, **options), code=code)


def arguments(folder: Path, checkpoints: Checkpoints, *more: str, model: str = "bert", **options: Any) -> list[str]:
    """Of `run`."""
    rate, steps = LEARNS[model]
    given = {"tasks": write(folder.parent, model), "conflict_steps": 4, "window": 4} | options
    strategy = ["--strategy.name", "multi-task", "--strategy.options", json.dumps(given)]
    name = SHIPPED if model == "llama" else checkpoints[model]
    settings = ["--learning-rate", rate, "--max-steps", str(steps), *QUICK, *strategy, *more]
    return ["--model", name, *settings]
