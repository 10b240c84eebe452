"""The loss is what the plain model's own would be, row by row: the right tokens are learned, and nothing else."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastpeft.config import FastpeftConfig
from fastpeft.models.tasks import auto_class
from fastpeft.training.preparing import prepare
from tests.checkpoints import Checkpoints, write_rows

from .runs import chats, completions, texts, train

full = pytest.mark.full
STILL = shlex.split(
    "--max-steps 2 --learning-rate 0 --logging-steps 1 --per-device-eval-batch-size 64 --report-to none --batch-size 64"
)


def losses_by_hand(config: FastpeftConfig) -> float:
    """Of the base model: each row alone, each learned token counted once."""
    from rich.console import Console

    rows = prepare(config, Console(quiet=True)).rows.rows
    options = {"num_labels": len(labels)} if (labels := config.data.labels) else {}
    model = auto_class(config.model.task).from_pretrained(config.model.name, **options).eval()
    total, count = 0.0, 0
    for row in rows:
        batch = {name: torch.tensor([value]) for name, value in row.items()}
        with torch.no_grad():
            logits = model(**batch).logits
        if config.model.task == "causal-lm":
            logits, batch["labels"] = logits[:, :-1], batch["labels"][:, 1:]
        learned = batch["labels"] != -100
        total += cross_entropy(logits[learned], batch["labels"][learned], reduction="sum").item()
        count += int(learned.sum())
    return total / count


@pytest.mark.parametrize(
    ("model", "rows", "more"),
    [
        pytest.param("llama", chats(), "", marks=full),
        ("llama", chats(), "--assistant-only false"),
        ("llama", chats(), "--packing --max-length 64"),
        ("llama", chats(), "--batch-size 5 --gradient-accumulation-steps 3"),
        ("llama", completions(), ""),
        pytest.param("llama", texts(), "", marks=full),
        pytest.param("marian", completions(), "", marks=full),
        ("t5", completions(), ""),
    ],
)
def test_training_and_evaluation(
    model: str, rows: list[dict[str, Any]], more: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    path, held = (write_rows(tmp_path / f"{name}.jsonl", *rows) for name in ("rows", "held"))
    run = train(
        tmp_path / "run", "--model", checkpoints[model], "--data", path, "--eval-path", held, *STILL, *more.split()
    )
    expected = losses_by_hand(FastpeftConfig.from_yaml(run.folder / "config.yaml"))
    assert [loss for _, loss in run.record["evaluation"]][-1] == pytest.approx(expected, rel=1e-5)
    if model == "llama":  # the others drop out while they are trained
        assert run.losses == pytest.approx([expected, expected], rel=1e-5)
