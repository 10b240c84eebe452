"""`fastpeft train` under torchrun: two processes, one of them killed in mid-training and started again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import Checkpoints, write_rows
from tests.commands import run as command
from tests.fresh import ROOT

from .runs import adapter, chats

KILLED = """
import os, signal, sys
from fastpeft.cli import main
from fastpeft.training.stopping import StopOnSignal

at, original = int(sys.argv.pop(1)), StopOnSignal.on_step_end

def on_step_end(self, args, state, control, **rest):
    if (state.global_step, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (at, "1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, args, state, control, **rest)

StopOnSignal.on_step_end = on_step_end
main()
"""
STEPS = shlex.split(
    "--learning-rate 1e-2 --logging-steps 1 --lora.r 4 --lora.dropout 0.2 --report-to none --batch-size 2 "
    "--max-steps 6 --save-steps 2 --eval-fraction 0 --resume-or-begin --quiet"
)


def trained(folder: Path, model: str, rows: str, killed_at: int) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The run's record, its adapter, and what torchrun said."""
    script, target = folder.with_suffix(".py"), folder / "run"
    script.write_text(KILLED)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    words = ["train", "--model", model, "--data", rows, "--output-dir", str(target), *STEPS]
    done = subprocess.run(
        [sys.executable, *start, str(script), str(killed_at), *words],
        env={
            **os.environ,
            **{"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"},
            # else torch keeps the addresses of the processes that died
            **{"CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        },
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((target / "run.json").read_text()), adapter(target), done.stderr


@pytest.mark.full
def test_a_killed_process_is_started_again_and_ends_with_the_same_numbers(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", *chats(24))
    whole, wanted, _ = trained(tmp_path / "whole", checkpoints["llama"], rows, killed_at=0)
    broken, found, said = trained(tmp_path / "broken", checkpoints["llama"], rows, killed_at=5)
    assert "-9" in said or "Signal 9" in said, said[-2000:]
    assert broken["losses"] == whole["losses"] and len(whole["losses"]) == 6
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_either_or(capsys: pytest.CaptureFixture[str]) -> None:
    answer = command(capsys, "train", "--resume-or-begin", "--overwrite", "--model", "m", "--data", "d")
    assert answer.code == 2
    assert "--resume-or-begin: expected it without --resume and --overwrite, got both" in answer.err
