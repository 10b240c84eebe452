"""`training.optim`: each does what it would do elsewhere, and a run that is resumed goes on with its state."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import Checkpoints, write_rows
from tests.fresh import ROOT

from .runs import adapter, chats, classes, interrupted, train

COMMON = shlex.split("--learning-rate 1e-2 --logging-steps 1 --lora.r 4 --report-to none --batch-size 2 --max-steps 5")


@pytest.fixture
def arguments(checkpoints: Checkpoints, tmp_path: Path) -> list[str]:
    return ["--model", checkpoints["llama"], "--data", write_rows(tmp_path / "rows.jsonl", *chats()), *COMMON]


def same_adapters(one: Path, other: Path) -> bool:
    first, second = adapter(one), adapter(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("model", ["bert", pytest.param("llama", marks=pytest.mark.full)])
def test_ours_trains_as_the_fused_one_of_torch(model: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", *(classes() if model == "bert" else chats()))
    arguments = ["--model", checkpoints[model], "--data", rows, *COMMON, "--weight-decay", "0.1"]
    found = train(tmp_path / "ours", *arguments, "--optim", "fastpeft_adamw")
    wanted = train(tmp_path / "torch", *arguments, "--optim", "adamw_torch_fused")
    assert found.losses == wanted.losses
    assert same_adapters(found.folder, wanted.folder)
    assert found.config["training"]["optim"] == "fastpeft_adamw"


@pytest.mark.full
@pytest.mark.parametrize("name", ["fastpeft_adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_resumed_run_has_its_state(name: str, arguments: list[str], tmp_path: Path) -> None:
    if name != "fastpeft_adamw":
        pytest.importorskip("bitsandbytes")
    arguments += ["--optim", name, "--save-steps", "2"]
    wanted = train(tmp_path / "whole", *arguments)
    assert wanted.losses[-1] < wanted.losses[0]
    interrupted(tmp_path / "cut", *arguments, at=3)
    found = train(tmp_path / "cut", "--resume")
    assert found.losses == wanted.losses and same_adapters(found.folder, wanted.folder)


def test_one_that_does_not_run_here_is_said_before_anything_is_written(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def refused(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no 8 bits on this CPU")

    monkeypatch.setattr(bitsandbytes.optim.AdamW, "step", refused)
    train(tmp_path / "run", *arguments, "--optim", "adamw_8bit", code=2)
    assert "training.optim: adamw_8bit: no 8 bits on this CPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


SCRIPT = """
import sys
from fastpeft.cli import app
from fastpeft.training import optimizers

original, built, views = optimizers.set_optimizer, [], sys.argv[1] == "views"

def kept(trainer, *given):
    original(trainer, *given)
    if not views:
        trainer.accelerator.ddp_handler.gradient_as_bucket_view = False
    built.append(trainer)

optimizers.set_optimizer = kept
assert app.run(["train", *sys.argv[2:]]) == 0
assert built[0].model_wrapped.gradient_as_bucket_view == views
"""


@pytest.mark.full
def test_two_processes_need_no_second_copy_of_gradients(arguments: list[str], tmp_path: Path) -> None:
    """Gradients lie where the processes add them up; the adapter is the same as with gradients of their own."""
    (tmp_path / "script.py").write_text(SCRIPT)
    for views in ("views", "copies"):
        given = ["--quiet", "--output-dir", str(tmp_path / views), *arguments, "--gradient-accumulation-steps", "2"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*launch, str(tmp_path / "script.py"), views, *given, "--optim", "fastpeft_adamw"],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
    assert same_adapters(tmp_path / "views", tmp_path / "copies")
