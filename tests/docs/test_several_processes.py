"""The script of docs/how-to/several-gpus.md in two processes on this CPU, one a GPU's stand-in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fresh import ROOT

from .pages import read
from .snippets import Block, Replace, Runner, Setup, read_page

PAGE = "docs/how-to/several-gpus.md"
AT_THE_END = """
import os, torch
from torch.nn.parallel import DistributedDataParallel

assert isinstance(trainer.model_wrapped, DistributedDataParallel) and os.environ["WORLD_SIZE"] == "2"
rows = [row for row in fastpeft.report(model).rows if row.kind in ("lora", "mlp")]  # 28 projections and 4 MLPs
assert len(rows) == 32 and all(row.accelerated and not row.note for row in rows)
trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
assert any(p.any() for name, p in trained.items() if "lora_B" in name), "nothing was trained"
torch.save(trained, f"rank{os.environ['RANK']}.pt")
"""


@pytest.mark.full
def test_two_processes_end_with_the_same_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    runner = Runner(PAGE)
    steps = read_page(read(PAGE), PAGE)
    script = next(step for step in steps if isinstance(step, Block) and step.title == "train.py")
    runner.run([step for step in steps if isinstance(step, Setup | Replace)])
    Path("train.py").write_text(runner.text_of(script) + AT_THE_END)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(f"rank{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
