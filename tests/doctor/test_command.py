"""The command: its output, its exit codes, and that it holds together on machines that are not as they should be."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import fastpeft
from fastpeft.cli import app
from fastpeft.doctor import Diagnosis, Finding, Status, examine, host, machine, render
from fastpeft.doctor.findings import note, ok, problem, warning
from fastpeft.doctor.machine import Torch
from fastpeft.doctor.system import Smi
from tests.doctor.machines import CPU_ONLY, CPU_TORCH, H200, SMI, cuda_torch
from tests.doctor.machines import machine as make
from tests.fresh import run_fresh

FINE = ok("python", "CPython 3.12", version="3.12")
REMARK = note("trl", "not installed", "Run pip install.", version=None)
BAD = problem("torch", "built for CPUs only", "Install a build of torch for CUDA 12.8 or older: https://pytorch.org/x")


def pretend(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> None:
    monkeypatch.setattr("fastpeft.doctor.examine", lambda: Diagnosis("1.2.3", findings))


@pytest.mark.parametrize("options", [[], ["--json"], ["--quiet"]])
@pytest.mark.parametrize(
    ("worst", "code"), [(FINE, 0), (REMARK, 0), (warning("ram", "little", "Buy some."), 0), (BAD, 1)]
)
def test_the_exit_code_is_1_for_problems_only(
    monkeypatch: pytest.MonkeyPatch, options: list[str], worst: Finding, code: int
) -> None:
    pretend(monkeypatch, FINE, worst)
    assert app.run(["doctor", *options]) == code


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(monkeypatch, FINE, REMARK)
    app.run(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "fastpeft": "1.2.3",
        "status": "note",
        "findings": [
            {"name": "python", "status": "ok", "text": "CPython 3.12", "advice": "", "values": {"version": "3.12"}},
            {
                "name": "trl",
                "status": "note",
                "text": "not installed",
                "advice": "Run pip install.",
                "values": {"version": None},
            },
        ],
    }


def test_quiet_shows_what_is_not_ok(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(monkeypatch, FINE, REMARK)
    app.run(["doctor", "--quiet"])
    assert capsys.readouterr().out == "note     trl  not installed\n              -> Run pip install.\n"
    app.run(["doctor", "--quiet", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in shown["findings"]] == ["trl"] and shown["status"] == "note"
    pretend(monkeypatch, FINE)
    app.run(["doctor", "--quiet"])
    assert capsys.readouterr().out == ""


def test_text_is_aligned_and_wrapped() -> None:
    long = "word " * 40 + "https://pytorch.org/get-started/locally/ end"
    shown = render.as_text(Diagnosis("1", (FINE, BAD, note("link gpu 0", long, long))), width=80).plain
    lines = shown.splitlines()
    assert all(len(line) <= 80 and line.isascii() for line in lines)
    assert {line.index(text) for line, text in zip(lines, ("CPython", "built"), strict=False)} == {21}
    assert lines[2].startswith(" " * 21 + "-> Install") and lines[3].startswith(" " * 24)
    assert sum("https://pytorch.org/get-started/locally/" in line for line in lines) == 2  # whole, to be copied
    assert lines[-1] == "fastpeft 1: 1 problem, 1 note"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("terminal", "no_color", "coloured"), [(1, 0, True), (1, 1, False), (0, 0, False)])
def test_colour_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, no_color: bool, coloured: bool
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    render.show(Diagnosis("1", (BAD,)))
    assert ("\x1b[" in out.getvalue()) is coloured and "problem" in out.getvalue()


def test_a_terminal_without_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    render.show(Diagnosis("1", (ok("disk", "in /données [bold]x"),)))
    out.flush()
    assert b"/donn\\xe9es [bold]x" in raw.getvalue()


def test_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_neverprintthis")
    code = app.run(["doctor", "--json"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "neverprint" not in printed and str(Path.home()) + "/" not in printed
    shown = json.loads(printed)
    names = [finding["name"] for finding in shown["findings"]]
    assert len(names) == len(set(names)) and shown["fastpeft"] == fastpeft.__version__
    wanted = {"system", "python", "torch", "bf16", "bitsandbytes", "peft", "ram", "disk here", "lora", "lora 4-bit"}
    assert wanted <= set(names)
    assert all(list(finding) == ["name", "status", "text", "advice", "values"] for finding in shown["findings"])
    assert code == (1 if shown["status"] == "problem" else 0)
    assert not [finding for finding in shown["findings"] if "this check failed" in finding["text"]]


def test_a_gpu_that_is_not_really_there_is_no_crash() -> None:
    """Every check that turns to the GPU fails here, in whatever way torch, Triton and bitsandbytes fail."""
    diagnosis = examine(make(cuda_torch(H200, replace(H200, index=1))))
    found = {finding.name: finding for finding in diagnosis.findings}
    assert {"gpu 0", "gpu 1", "driver", "torch", "triton", "link gpu 0", "left as is"} <= set(found)
    if not machine.look_at_torch().gpus:
        assert diagnosis.status is Status.problem and found["link gpu 0"].status is Status.warning


def test_without_torch_the_rest_is_still_told() -> None:
    found = {finding.name: finding for finding in examine(make(Torch(error="ImportError: no torch"), SMI)).findings}
    assert found["torch"].status is Status.problem and found["gpu 0"].values["name"] == "NVIDIA H200"
    assert "lora" in found and "ram" in found


def test_a_check_that_fails_costs_only_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Iterator[Finding]:
        print("noise of a library")
        raise OSError("no such file: /home/bob/x")

    monkeypatch.setattr(host, "python", fail)
    found = {finding.name: finding for finding in examine(CPU_ONLY).findings}
    assert found["python"].status is Status.warning
    assert found["python"].text == "this check failed: OSError: no such file: /home/<user>/x"
    assert {"system", "ram", "left as is"} <= set(found)
    assert capsys.readouterr().out == ""  # stdout is for the result


def test_facts_are_asked_for_with_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(machine, "look_at_torch", lambda: time.sleep(20))
    monkeypatch.setattr(machine, "TORCH_LIMIT_S", 0.2)
    monkeypatch.setattr(machine.system, "nvidia_smi", lambda: SMI)
    monkeypatch.setattr(machine.system, "driver_cuda", lambda: None)
    monkeypatch.setattr(machine.system, "smi_cuda", lambda: (12, 8))
    seen = machine.look()
    assert "hangs: no answer in 0.2 s" in seen.torch.error and seen.smi is SMI and seen.driver_cuda == (12, 8)


def test_the_driver_s_own_answer_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "look_at_torch", lambda: CPU_TORCH)
    monkeypatch.setattr(machine.system, "nvidia_smi", lambda: Smi())
    monkeypatch.setattr(machine.system, "smi_cuda", lambda: pytest.fail("asked for no reason"))
    for own in ((12, 4), None):
        monkeypatch.setattr(machine.system, "driver_cuda", lambda own=own: own)
        assert machine.look().driver_cuda == own


def test_help_loads_nothing_heavy() -> None:
    code = """
from fastpeft.cli.app import run
assert run(["doctor", "--help"]) == 0
heavy = {"torch", "triton", "transformers", "peft", "bitsandbytes", "matplotlib", "numpy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    shown = run_fresh(code)
    assert "--json" in shown and "--quiet" in shown
