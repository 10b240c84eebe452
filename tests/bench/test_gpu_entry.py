"""`make gpu` on parts that pass, fail, hang, break and crash; on a CPU."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from fastpeft.bench import gpu, parts, supervising
from fastpeft.bench.recorder import unit_of
from fastpeft.bench.records import RecordFile, environment, load
from fastpeft.bench.supervising import MINIMUM_S, Budget
from tests.fresh import ROOT, run_fresh

HEAD = "order, time_limit_s = {order}, {limit}\ndef run(recorder, depth): raise RuntimeError('not on a CPU')\n"
PASSING = """
def dry_run(recorder, depth):
    recorder.add(case="a", op="demo", peer="torch", metric="time", unit="ms", samples=[1, 2, 3], settings={"rank": 4})
    print(recorder.device, depth)
"""
FAILING = """
def wrong():
    raise AssertionError("0.5 is over the budget of 0.1")

def dry_run(recorder, depth):
    recorder.run_checks("demo", [("odd sizes", wrong), ("even sizes", lambda: {"decode_ms": 0.25, "dtype": "fp16"})])
"""
HANGING = """
import subprocess, sys, time
def dry_run(recorder, depth):
    recorder.run_checks("demo", [("first", lambda: None), ("second", hang)])
def hang():
    sleep = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    own, detached = subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)
    print("child", own.pid, detached.pid, flush=True)
    time.sleep(60)
"""
CRASHING = """
import os
def dry_run(recorder, depth):
    os._exit(7)
"""


class Runner:
    """A package of fake parts and a folder for results."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.package = folder / "fake_parts"
        self.package.mkdir()
        (self.package / "__init__.py").touch()

    def add(self, name: str, body: str, order: int = 1, limit: float = 60) -> None:
        (self.package / f"{name}.py").write_text(HEAD.format(order=order, limit=limit) + body)

    def __call__(self, *arguments: str) -> int:
        for name in [name for name in sys.modules if name.startswith("fake_parts")]:
            del sys.modules[name]
        return gpu.main(["--parts", "fake_parts", "--out", str(self.out), *arguments])

    def states(self) -> dict[str, str]:
        return {row["name"]: row["status"] for row in json.loads((self.out / "run.json").read_text())}


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")]))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return Runner(tmp_path)


def test_a_passing_part_leaves_records(runner: Runner) -> None:
    runner.add("passing", PASSING)
    assert runner("--dry-run", "--depth", "quick", "--commit", "abc") == 0
    (record,) = load(runner.out / "passing.jsonl")
    assert (record.suite, record.case, record.median) == ("passing", "a", 2.0)
    assert record.settings == {"rank": 4, "depth": "quick"}
    assert (runner.out / "passing.log").read_text() == "cpu quick\n"


def test_a_failing_part_is_recorded_and_the_next_one_runs(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    runner.add("failing", FAILING, order=1)
    runner.add("passing", PASSING, order=2)
    assert runner("--dry-run") == 1
    assert runner.states() == {"failing": "failed", "passing": "passed"}
    found = {(r.case, r.metric): (r.median, r.unit, r.settings) for r in load(runner.out / "failing.jsonl")}
    depth = {"depth": "default"}
    assert found == {
        ("odd sizes", "passed"): (0.0, "1", {"failure": "AssertionError: 0.5 is over the budget of 0.1", **depth}),
        ("even sizes", "decode_ms"): (0.25, "ms", {"dtype": "fp16", **depth}),
        ("even sizes", "passed"): (1.0, "1", {"dtype": "fp16", **depth}),
    }
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[1].split()[:2] == ["failing", "failed"] and table[1].endswith("1 failed: odd sizes")
    assert table[2].split() == ["passing", "passed", table[2].split()[2], "1"]


def test_a_hanging_part_is_killed_with_its_children(runner: Runner) -> None:
    runner.add("hanging", HANGING, order=1, limit=60)
    runner.add("passing", PASSING, order=2)
    start = time.monotonic()
    assert runner("--dry-run", "--limit", "4") == 1
    assert time.monotonic() - start < 40
    assert runner.states() == {"hanging": "timed out", "passing": "passed"}
    reason = json.loads((runner.out / "run.json").read_text())[0]["reason"]
    assert reason == "killed at its limit of 4 s, 1 checks passed; --resume goes on"
    assert [r.case for r in load(runner.out / "hanging.jsonl")] == ["first"]
    own, detached = map(int, (runner.out / "hanging.log").read_text().split("child ")[1].split()[:2])
    assert ends(own) and ends(detached)


def ends(pid: int) -> bool:
    """Within a few seconds: a process that was killed is still there for a while."""
    deadline = time.monotonic() + 10
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not running(pid)


def running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except OSError:
        return False


def test_a_crash_and_a_part_that_cannot_be_imported_cost_only_themselves(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.add("crashing", CRASHING, order=1)
    runner.add("broken", "import no_such_module\n", order=2)
    runner.add("gpu_only", "", order=3)
    runner.add("passing", PASSING, order=4)
    assert runner("--dry-run") == 1
    assert runner.states() == {"broken": "failed", "crashing": "failed", "gpu_only": "skipped", "passing": "passed"}
    printed = capsys.readouterr().out
    assert "ended with code 7" in printed and "No module named 'no_such_module'" in printed


def test_resuming_runs_what_has_not_passed(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    runner.add("one", PASSING, order=1)
    runner.add("two", FAILING, order=2)
    assert runner("--dry-run", "--depth", "quick") == 1
    runner.add("two", PASSING, order=2)
    assert runner("--dry-run", "--depth", "quick", "--resume") == 0
    assert "one: done before" in capsys.readouterr().out
    assert len(load(runner.out / "one.jsonl")) == 1
    assert [r.case for r in load(runner.out / "two.jsonl")] == ["odd sizes", "even sizes", "even sizes", "a"]
    assert runner("--dry-run", "--depth", "full", "--resume") == 0
    assert "done before" not in capsys.readouterr().out
    assert len(load(runner.out / "two.jsonl")) == 1


def test_resuming_leaves_out_the_checks_that_passed(runner: Runner) -> None:
    """Of a part that ended in the middle of a record; what failed is tried again, and its last result counts."""
    ending = "os._exit(7) if name == 'd' else 1 / 0 if name == 'b' else {'pid': os.getpid()}"
    runner.add("shared", SHARED.replace("{a}", ending))
    assert runner("--dry-run", "--jobs", "1") == 1
    (outcome,) = json.loads((runner.out / "run.json").read_text())
    assert outcome["reason"] == "ended with code 7; 1 failed: b"
    with open(runner.out / "shared.jsonl", "a") as file:
        file.write('{"cut')
    runner.add("shared", SHARED.replace("{a}", "{'pid': os.getpid()}"))
    assert runner("--dry-run", "--resume", "--jobs", "1") == 0
    made = [(r.case, r.median) for r in load(runner.out / "shared.jsonl") if r.metric == "passed"]
    assert made == [("a", 1), ("b", 0), ("c", 1), ("b", 1), ("d", 1), ("e", 1)]
    assert runner.states() == {"shared": "passed"} and not list(runner.out.glob("*.checks.json"))


def test_an_interruption_keeps_what_was_measured(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    runner.add("hanging", HANGING, order=1)
    runner.add("passing", PASSING, order=2)

    def interrupt() -> None:
        log = runner.out / "hanging.log"
        while not (log.exists() and "child" in log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert runner("--dry-run") == 130
    thread.join()
    assert runner.states() == {"hanging": "interrupted"}
    assert [r.case for r in load(runner.out / "hanging.jsonl")] == ["first"]
    own, detached = map(int, (runner.out / "hanging.log").read_text().split("child ")[1].split()[:2])
    assert ends(own) and ends(detached)
    assert capsys.readouterr().out.splitlines()[-1].split()[:4] == ["hanging", "interrupted", "0", "1"]


class TestBudget:
    def part(self, limit: float, parallel: bool = False) -> parts.Part:
        return parts.Part("x", time_limit_s=limit, parallel=parallel)

    def test_checks_take_what_they_need_and_the_others_share_the_rest(self) -> None:
        now = [0.0]
        budget = Budget(1000.0, lambda: now[0])
        later = [self.part(400), self.part(400), self.part(200)]
        assert budget.seconds(self.part(480, parallel=True), later) == 480
        now[0] = 400.0
        assert budget.seconds(later[0], later[1:]) == pytest.approx(600 * 0.4)
        now[0] = 410.0  # it needed less
        assert budget.seconds(later[1], later[2:]) == pytest.approx(590 * 400 / 600)
        now[0] = 930.0
        assert budget.seconds(later[2], []) == pytest.approx(70)

    def test_never_less_than_a_minute(self) -> None:
        now = [0.0]
        budget = Budget(1000.0, lambda: now[0])
        assert budget.seconds(self.part(10), [self.part(480)] * 30) == 10  # its own limit
        now[0] = 900.0
        assert budget.seconds(self.part(480), [self.part(480)] * 10) == MINIMUM_S
        now[0] = 941.0
        assert budget.seconds(self.part(480), []) is None and budget.seconds(self.part(20), []) == 20

    def test_no_budget(self) -> None:
        assert Budget(float("inf")).seconds(self.part(30), [self.part(40)]) == 30


def test_a_part_names_what_it_needs(runner: Runner) -> None:
    """Without it there is nothing to run, and nothing wrong."""
    runner.add("lacking", "needs = ('json', 'no_such_package')\n" + FAILING)
    runner.add("served", "needs = ('json',)\n" + PASSING)
    assert runner("--dry-run") == 0
    assert runner.states() == {"lacking": "passed", "served": "passed"}
    logs = {name: (runner.out / f"{name}.log").read_text() for name in runner.states()}
    assert "no_such_package is not installed: nothing was measured" in logs["lacking"]
    assert "installed" not in logs["served"] and load(runner.out / "served.jsonl")


def test_parts_for_which_no_time_is_left_are_named(
    runner: Runner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "MINIMUM_S", 3.0)
    runner.add("long", PASSING, order=1)
    runner.add("short", PASSING, order=2, limit=0.5)
    assert runner("--dry-run", "--total", "2") == 1
    assert runner.states()["long"] == "skipped"
    printed = capsys.readouterr().out
    assert "long: skipped: out of time" in printed and "short: started" in printed
    runner.add("short", PASSING, order=2)
    assert runner("--dry-run", "--resume", "--total", "60") == 0
    assert runner.states() == {"long": "passed", "short": "passed"}


@pytest.mark.full
def test_a_machine_without_the_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part ends by itself, and says what it could not measure."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules.update(dict.fromkeys(['peft', 'bitsandbytes', 'liger_kernel', 'trl', 'unsloth']))\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")]))
    without = ("kernels", "speed", "ops", "optimizer")  # which need none of them
    names = [name for name in parts.discover("fastpeft.bench.gpu_parts") if name not in without]
    only = [word for name in names for word in ("--only", name)]
    assert gpu.main(["--dry-run", "--depth", "quick", "--out", str(tmp_path / "out"), *only]) == 0
    logs = {name: (tmp_path / "out" / f"{name}.log").read_text() for name in names}
    assert [name for name, log in logs.items() if "peft is not installed" not in log] == []


@pytest.mark.full
@pytest.mark.parametrize("name", ["kernels", "speed", "mixed", "scaling"])
def test_a_dry_run_of_a_real_part(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dry-run", "--depth", "quick", "--out", str(tmp_path), "--only", name]
    assert gpu.main(arguments) == 0, capsys.readouterr().out
    assert load(tmp_path / f"{name}.jsonl")


SHARED = """
parallel = True
def dry_run(recorder, depth):
    recorder.run_suites({"one": checks("a", "b"), "two": checks("c", "d", "e")})

def checks(*names):
    import os, time
    for name in names:
        yield name, lambda name=name: {a}
"""


def test_processes_share_the_checks_of_a_parallel_part(runner: Runner) -> None:
    runner.add("shared", SHARED.replace("{a}", "{'pid': os.getpid()}"))
    assert runner("--dry-run", "--jobs", "2") == 0
    pids = {r.case: r.median for r in load(runner.out / "shared.jsonl") if r.metric == "pid"}
    assert pids["a"] == pids["c"] == pids["e"] != pids["b"] == pids["d"]
    assert {r.case: r.op for r in load(runner.out / "shared.jsonl")}["d"] == "two"
    assert runner.states() == {"shared": "passed"}
    assert runner("--dry-run", "--jobs", "2", "--checks", "[be]") == 0
    assert {r.case for r in load(runner.out / "shared.jsonl")} == {"b", "e"}
    assert runner("--dry-run", "--jobs", "2", "--checks", "f") == 1  # there is none
    assert runner("--dry-run", "--resume", "--checks", "[be]") == 0
    assert runner("--dry-run", "--resume") == 0
    assert len({r.case for r in load(runner.out / "shared.jsonl")}) == 5


def test_what_passed_before_comes_last(runner: Runner) -> None:
    runner.add("shared", SHARED.replace("{a}", "{'pid': os.getpid()}"))
    assert runner("--dry-run", "--jobs", "1", "--checks", "[bd]") == 0
    assert runner("--dry-run", "--jobs", "1", "--earlier", str(runner.out)) == 0
    assert [r.case for r in load(runner.out / "shared.jsonl") if r.metric == "passed"] == ["a", "c", "e", "b", "d"]
    assert not list(runner.out.glob("*.checks.json"))


def test_what_failed_before_has_not_passed(tmp_path: Path) -> None:
    """Whatever another run found; records that cannot be read say nothing."""
    file = RecordFile(tmp_path / "shared-first-run.jsonl", environment())
    for case, passed in (("a", 1), ("b", 1), ("b", 0), ("c", 1)):
        file.add(suite="shared", case=case, op="o", peer="fastpeft", metric="passed", unit="1", samples=passed)
    line = file.path.read_text().partition("\n")[0]
    (tmp_path / "shared.jsonl").write_text(line.replace('"a"', '"d"')[:-20])
    run = parts.Run(tmp_path / "out", "quick", True, None, "parts", earlier=tmp_path)
    assert run.proven("shared") == [("o", "a"), ("o", "c")]


def test_what_fails_crashes_or_hangs_in_one_of_several_processes(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.add("failing", SHARED.replace("{a}", "1 / 0 if name in 'bc' else None"), order=1)
    runner.add("crashing", SHARED.replace("{a}", "os.abort() if name == 'd' else None"), order=2)
    runner.add("hanging", SHARED.replace("{a}", "time.sleep(60) if name == 'd' else None"), order=3, limit=6)
    assert runner("--dry-run", "--jobs", "2") == 1
    assert runner.states() == {"failing": "failed", "crashing": "failed", "hanging": "timed out"}
    table = capsys.readouterr().out.splitlines()[-3:]
    assert table[0].endswith(("2 failed: b, c", "2 failed: c, b")) and table[1].endswith("ended with code -6")
    assert {r.case for r in load(runner.out / "hanging.jsonl")} == {"a", "b", "c", "e"}


def test_only_runs_one_and_keeps_the_others_outcomes(runner: Runner) -> None:
    runner.add("one", PASSING, order=1)
    runner.add("two", FAILING, order=2)
    assert runner("--dry-run") == 1
    assert runner("--dry-run", "--only", "one") == 0
    assert runner.states() == {"one": "passed", "two": "failed"}


def test_only_with_an_unknown_part(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    runner.add("kernels_lora", PASSING)
    with pytest.raises(SystemExit) as stop:
        runner("--only", "kernel_lora")
    assert stop.value.code == 2
    assert "--only: expected one of kernels_lora, got kernel_lora; kernels_lora?" in capsys.readouterr().err


def test_without_a_gpu(runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runner.add("passing", PASSING)
    monkeypatch.setattr(gpu, "gpu_name", lambda: "")
    assert runner() == 2
    assert capsys.readouterr().out.startswith("No NVIDIA GPU that torch can use was found")
    assert not runner.out.exists()


def test_the_list(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    runner.add("later", '"""not the docstring"""', order=2)
    runner.add("sooner", "", order=1, limit=30)
    assert runner("--list") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["sooner", "limit", "30", "s"] and second.startswith("later")


def test_the_parts_of_fastpeft_are_light_and_whole() -> None:
    code = (
        "from fastpeft.bench.parts import discover\n"
        "found = discover('fastpeft.bench.gpu_parts')\n"
        "assert found and not [p for p in found.values() if p.broken], found\n"
        "assert all(p.summary and p.time_limit_s > 0 for p in found.values()), found\n"
    )
    run_fresh(code, blocked=["torch", "triton", "peft", "bitsandbytes", "transformers"])


def test_names() -> None:
    assert gpu.slug("NVIDIA H200") == "nvidia-h200"
    assert [unit_of(name) for name in ("decode_ms", "traffic_gb_s", "share", "peak_mib")] == ["ms", "GB/s", "1", "MiB"]
    assert parts.Part("x").run is None


def test_packages_that_every_part_needs_are_looked_for_first(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.add("passing", PASSING)
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert runner("--dry-run") == 2
    assert "needed everywhere: platformdirs: nothing was run" in capsys.readouterr().out
    assert not runner.out.exists()
