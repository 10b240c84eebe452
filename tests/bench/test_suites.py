"""The suites of pytest-benchmark: what they collect, and one of them as it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fresh import ROOT


@pytest.mark.full
def test_a_suite_keeps_every_sample_of_every_peer(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_bench_quant.py"]
    command += ["--benchmark-only", "--depth", "quick", "-k", "float32", f"--benchmark-json={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())["benchmarks"]
    info = found["extra_info"]
    assert {"fastpeft", "copy", "bitsandbytes", "torch", "torch again"} == set(info["ms"])
    assert all(len(samples) == found["stats"]["rounds"] == 5 for samples in info["ms"].values())
    assert sum(sum(samples) for samples in info["ms"].values()) <= 1.1e3 * found["stats"]["total"]
    assert (info["direction"], info["dtype"]) == ("forward", "float32")
    assert info["left_out"]["unsloth"] == "needs a GPU"
