"""Processes that write choices at the same time, some of which are killed at it, and one that reads meanwhile."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

from fastpeft_kernels.tuning import files
from fastpeft_kernels.tuning.records import Winner

DEVICE = "Some GPU 9000"
FORK = multiprocessing.get_context("fork")
EACH = 6


def add_some(path: Path, first: int) -> None:
    for number in range(first, first + EACH):
        files.add(path, DEVICE, [Winner("op", {"tokens": number}, "b", {"b": 1.5})])


def killed_at_it(path: Path, first: int) -> None:
    """With its file written, but not in place."""
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    add_some(path, first)


def numbers(path: Path) -> set[int]:
    return {winner.key["tokens"] for winner in files.read(path, DEVICE)}


def test_nothing_is_lost_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "some-gpu-9000.json"
    writers = [FORK.Process(target=add_some, args=(path, EACH * place)) for place in range(4)]
    victims = [FORK.Process(target=killed_at_it, args=(path, 1000 + place)) for place in range(3)]
    for process in (writers[0], victims[0], *writers[1:], *victims[1:]):
        process.start()
    seen: set[int] = set()
    while any(process.is_alive() for process in (*writers, *victims)):
        found = numbers(path)  # raises where a file is not whole
        assert found >= seen
        seen = found
        time.sleep(0.002)
    for process in (*writers, *victims):
        process.join()
    assert [process.exitcode for process in writers] == [0] * 4
    assert [process.exitcode for process in victims] == [-signal.SIGKILL] * 3
    assert numbers(path) == set(range(4 * EACH))
    add_some(path, 2000)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["some-gpu-9000.json", "some-gpu-9000.lock"]


def test_files_of_other_devices_are_left_alone(tmp_path: Path) -> None:
    """Their writers hold other locks."""
    (tmp_path / ".gpu-2.json-abc.tmp").write_text("being written")
    add_some(tmp_path / "gpu.json", 0)
    assert (tmp_path / ".gpu-2.json-abc.tmp").exists()
