"""Where a step's time goes: what is sampled, and what of a whole step is written down."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest

from fastpeft.bench import profile
from fastpeft.bench.sampling import sampled


def busy_for(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_a_function_that_computes_is_seen_and_so_is_its_caller() -> None:
    def caller() -> None:
        busy_for(0.3)

    interval = sys.getswitchinterval()
    with sampled() as samples:
        caller()
    shares = samples.shares()
    here = "bench/test_profile.py"
    assert samples.count > 10 and shares[f"{here}: busy_for"][0] > 0.8
    itself, with_called = shares[f"{here}: caller"]
    assert itself < 0.1 and with_called > 0.8
    assert sys.getswitchinterval() == interval


def test_threads_that_begin_meanwhile_are_seen_and_those_before_are_not() -> None:
    over = threading.Event()

    def earlier() -> None:
        over.wait()

    before = threading.Thread(target=earlier)
    before.start()
    with sampled() as samples:
        new = threading.Thread(target=busy_for, args=(0.2,))
        new.start()
        new.join()
    over.set()
    before.join()
    shares = samples.shares()
    assert shares["bench/test_profile.py: busy_for"][1] > 0.2
    assert "bench/test_profile.py: earlier" not in shares


def test_a_case_is_profiled_for_each_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main(["--only", "bert lora float32", "--steps", "1", "--out", str(tmp_path)]) == 0
    lines = [json.loads(line) for line in (tmp_path / "profile.jsonl").read_text().splitlines()]
    assert [line["peer"] for line in lines] == ["peft", "fastpeft"]
    for line in lines:
        assert line["wall_ms"] > 0 and line["busy_ms"] == 0 and not line["kernels"]
        milliseconds, calls = line["operators"]["aten::mm"]
        assert milliseconds > 0 and calls == int(calls)
    assert len(list(tmp_path.glob("*.json.gz"))) == 2
    assert "torch's operators" in capsys.readouterr().out


def test_a_case_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile.main(["--only", "no such case"])
    assert "of which --list shows all" in capsys.readouterr().err
