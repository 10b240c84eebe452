"""Few-shot and dynamic runs under torchrun, in two processes on this CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import SHIPPED, Checkpoints, write_rows
from tests.fresh import ROOT
from tests.training.runs import texts

from .test_few_shot import settings


def launched(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run(
        [*launch, "-m", "fastpeft", "train", "--quiet", "--output-dir", str(folder), *arguments],
        env={**os.environ, **paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.full
def test_draws_are_trained_together_and_none_again(tmp_path: Path, checkpoints: Checkpoints) -> None:
    given = settings("contrastive", checkpoints, tmp_path, "--batch-size", "4", "--save-steps", "100", seeds=2)
    done = launched(tmp_path / "run", *given)
    assert done.returncode == 0, done.stderr[-4000:]
    draws = tmp_path / "run" / "few_shot_draws.json"
    assert [draw["seed"] for draw in json.loads(draws.read_text())] == [0, 1]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["losses"][-1][1] < 0.7 * record["losses"][0][1]
    written = draws.stat().st_mtime_ns
    done = launched(tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stderr[-4000:]
    assert draws.stat().st_mtime_ns == written, "no draw was trained again"


@pytest.mark.full
def test_rules_are_refused(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", *texts(24))
    options = json.dumps({"rules": [{"action": "sample"}]})
    strategy = ["--strategy.name", "dynamic", "--strategy.options", options]
    done = launched(tmp_path / "run", "--model", SHIPPED, "--data", rows, "--report-to", "none", *strategy)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    assert "strategy.name: dynamic expected one process, got 2" in done.stderr
