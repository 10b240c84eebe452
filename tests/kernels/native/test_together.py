"""Processes that build the C++ at the same time, after one that was killed with its compiler."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils import cpp_extension

from fastpeft_kernels.native import build

FORK = multiprocessing.get_context("fork")
WHOLE = "compiled " * 1000


def build_it(answer: Any) -> None:
    answer.put(str(build.built("some", ("dropout.cpp",), (), (), "")))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_they_compile_once_and_whoever_looks_finds_all_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, compiler, log = tmp_path / "fastpeft", tmp_path / "c++", tmp_path / "log"
    (tmp_path / "whole").write_text(WHOLE)
    monkeypatch.setattr(cpp_extension, "get_cxx_compiler", lambda: str(compiler))
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    find = f'while [ "$1" != -o ]; do shift; done; echo $PPID >> {log}; head -c 100 {tmp_path}/whole > "$2"'

    compiler.write_text(f"#!/bin/sh\n{find}; exec sleep 60\n")
    compiler.chmod(0o755)
    answers = FORK.Queue()
    victim = FORK.Process(target=build_it, args=(answers,))
    victim.start()
    until(lambda: log.exists() and log.read_text().endswith("\n"))
    until(lambda: any(path.stat().st_size for path in folder.glob(".*.tmp")))
    victim.kill()
    os.killpg(int(log.read_text()), signal.SIGKILL)  # its compiler, too, as where the power goes
    victim.join()

    compiler.write_text(f'#!/bin/sh\n{find}; sleep 0.3; cat {tmp_path}/whole > "$2"\n')
    processes = [FORK.Process(target=build_it, args=(answers,)) for _ in range(4)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        assert all(path.read_text() == WHOLE for path in folder.glob("*.so"))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    (library,) = {answers.get(timeout=10) for _ in processes}
    assert Path(library).read_text() == WHOLE and len(log.read_text().splitlines()) == 2
    assert sorted(folder.iterdir()) == sorted([Path(library), Path(library).with_suffix(".lock")])
