"""What runs leave for those that go on from them, beside checkpoints."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
from hypothesis import strategies as st

from benchmarks.fuzz.making import as_json
from benchmarks.fuzz.watching import Target
from fastpeft.errors import UserError
from fastpeft.strategies.compare import folder as comparison
from fastpeft.strategies.distillation.report import read_side
from fastpeft.strategies.few_shot import draws, heads
from fastpeft.strategies.multi_task import alone
from fastpeft.strategies.multi_task.balance import Memory
from fastpeft.strategies.multi_task.trainer import STATE, MultiTaskTrainer
from fastpeft.training import rate_search
from fastpeft.training.folder import ALONE, FINGERPRINT, RATES, check_data

PLAN = {"config": {"training": {"seed": 0}}, "methods": ["lora"]}
TASKS = 2
RATES_FOUND = [{"rate": 1e-3, "loss": 2.0}, {"rate": 1e-4, "loss": float("inf")}]
ALONE_FOUND = {"one": {"wanted": 8, "steps": 3, "rows": 6, "measured": [[1.0, 2.0]]}}
DRAWS_FOUND = [{"seed": 0, "steps": 3, "figures": {"trained": {"accuracy": 0.5}}}]
HEAD = {"kind": "worded", "labels": ["a", "b"], "words": ["x", "y"], "pattern": "p", "whole": False, "calibrate": True}
SIDE = {"parameters": 3, "mib": 1.0, "seconds": 0.5, "tokens": 8, "quality": {"loss per token": 2.0}}
MEMORY = {"memory": Memory.of(TASKS).to_dict() | {"windows": [[1.0, 2.0]]}, "log_variances": [0.0, 0.5]}
TEXTS = as_json(st.sampled_from((RATES_FOUND, ALONE_FOUND, DRAWS_FOUND, HEAD, SIDE, MEMORY, PLAN, {"trial": 1})))


def read(path: Path) -> None:
    """The same bytes as each of these files; what a file cannot be used for is measured again, or refused."""
    folder, data = path.parent / "run", path.read_bytes()
    folder.mkdir(exist_ok=True)
    for name in (RATES, ALONE, draws.DRAWS, heads.SETTINGS, STATE, comparison.PLAN, comparison.TRIALS, FINGERPRINT):
        (folder / name).write_bytes(data)
    assert all(isinstance(trial.rate, float) for trial in rate_search.read(folder) or ())
    assert all(isinstance(one.steps, int) for one in alone.read(folder).values())
    assert all(isinstance(draw.seed, int) for draw in draws.read(folder))
    assert all(isinstance(result, dict) for result in comparison.read(folder))
    side = read_side(data.decode(errors="replace"))
    assert side is None or isinstance(side.parameters, int)
    with suppress(ValueError):
        heads.read_settings(folder)
    weights = SimpleNamespace(log_variances=torch.zeros(TASKS))
    for attempt in (
        lambda: comparison.begin(folder, PLAN, overwrite=False),
        lambda: check_data(folder, "0" * 64),
        lambda: MultiTaskTrainer.recall(
            SimpleNamespace(plan=SimpleNamespace(memory=Memory.of(TASKS), weights=weights)), folder
        ),
    ):
        with suppress(UserError):
            attempt()


TARGETS = (Target("notes of runs", "note.json", TEXTS, read, ()),)
