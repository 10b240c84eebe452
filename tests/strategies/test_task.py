"""Task-adaptive runs: what the report says of their result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import Checkpoints, write_rows
from tests.training.runs import classes, train

QUICK = ["--max-steps", "12", "--batch-size", "4", "--logging-steps", "4", "--lora.r", "4", "--report-to", "none"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "train.jsonl", *classes(24))
    write_rows(folder / "test.jsonl", *classes(12))
    return folder


def result(folder: Path, rows: Path, checkpoints: Checkpoints, rate: str) -> dict[str, Any]:
    given = ("--model", checkpoints["bert"], "--data", str(rows), "--eval-split", "test")
    found = train(folder, *given, "--learning-rate", rate, *QUICK).record["findings"]
    assert isinstance(found, dict)
    return found


def test_metrics_have_intervals_and_a_baseline(tmp_path: Path, rows: Path, checkpoints: Checkpoints) -> None:
    found = result(tmp_path / "run", rows, checkpoints, "3e-2")
    accuracy, f1 = found["metrics"]
    assert accuracy["rows"] == 12 and accuracy["baseline"] == 0.5
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert f1["baseline"] == pytest.approx(1 / 3)  # one class has 2/3, the other nothing
    report = (tmp_path / "run" / "report.md").read_text()
    assert "## Result" in report and "the training rows' most frequent class" in report


def test_one_class_for_all_is_noticed(tmp_path: Path, rows: Path, checkpoints: Checkpoints) -> None:
    found = result(tmp_path / "run", rows, checkpoints, "0")
    assert found["metrics"][1]["value"] == pytest.approx(1 / 3), "untrained, it takes all for one class"
    assert "for every row of the evaluation: it has learned nothing" in found["notes"][0]
