"""Processes that pack the same checkpoint at once, one of which is killed at it, or while its entry is cleared."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from fastpeft.memory.packed import entries as packed_entries
from fastpeft.memory.packed.cache import PackedCache

from .test_cache import ABOUT, FORK, check_holds, folder, in_child, weight

__all__ = ["folder"]
WEIGHTS = [weight(number) for number in range(4)]


def load(place: Path, killed_at: int | None = None) -> None:
    """As a model is: each weight is read, or packed and kept."""
    with PackedCache(place, ABOUT) as cache:
        for number, one in enumerate(WEIGHTS):
            if number == killed_at:
                (place / "half.tmp").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            found: Any = cache.read(one.target)
            if found is None:
                cache.add(one)
            else:
                assert all(torch.equal(found[name], part) for name, part in one.parts.items())


def test_each_has_all_weights_and_the_entry_is_whole(folder: Path) -> None:
    victim = in_child(lambda: load(folder, killed_at=2))
    others = [in_child(lambda: load(folder)) for _ in range(4)]
    for process in (victim, *others):
        process.join(60)
    assert victim.exitcode == -signal.SIGKILL
    assert [process.exitcode for process in others] == [0] * 4
    check_holds(folder, WEIGHTS)
    assert not list(folder.glob("*.tmp")) and len(list(folder.glob("*.safetensors"))) == len(WEIGHTS)


def test_while_it_is_cleared_again_and_again(folder: Path) -> None:
    done = FORK.Event()

    def clear() -> None:
        while not done.is_set():
            for entry in packed_entries.entries(folder.parent):
                packed_entries.clear(entry)

    def load_often() -> None:
        for _ in range(10):
            load(folder)

    clearer, loaders = in_child(clear), [in_child(load_often) for _ in range(3)]
    for process in loaders:
        process.join(60)
    done.set()
    clearer.join(60)
    assert [process.exitcode for process in (clearer, *loaders)] == [0] * 4
    load(folder)
    check_holds(folder, WEIGHTS)
