"""`fastpeft cache`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastpeft.memory.packed.cache import PackedCache
from fastpeft.memory.packed.files import Packed
from tests.commands import run


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for name in ("one", "two"):
        with PackedCache(tmp_path / name, {"source": f"some/{name}", "packing": "nf4, float32, cpu"}) as cache:
            cache.add(Packed("layer.weight", "layer.weight", {"": torch.zeros(1 << 20, dtype=torch.uint8)}))
    return str(tmp_path)


def test_it_lists_and_clears(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    listed = run(capsys, "cache", "--folder", folder)
    assert listed.code == 0 and "       1 MiB  some/one  (nf4, float32, cpu)\n" in listed.out
    assert listed.out.endswith(f"       2 MiB  in {folder}\n")
    rows = json.loads(run(capsys, "cache", "--folder", folder, "--json").out)
    assert {row["model"] for row in rows} == {"some/one", "some/two"} and all(row["finished"] for row in rows)
    assert run(capsys, "cache", "--folder", folder, "--clear", "some/one").code == 0
    assert [row["model"] for row in json.loads(run(capsys, "cache", "--folder", folder, "--json").out)] == ["some/two"]
    assert run(capsys, "cache", "--folder", folder, "--clear", "all").out.endswith(f"       1 MiB  cleared {folder}\n")
    assert run(capsys, "cache", "--folder", folder).out == f"       0 MiB  in {folder}\n"


def test_a_model_that_is_not_there(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, "cache", "--folder", folder, "--clear", "some/three")
    assert answer.code == 2
    assert "--clear: expected all, or a model that fastpeft cache lists, got 'some/three'" in answer.err


def test_an_entry_in_use_stays(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    entry = Path(folder, "three")
    with PackedCache(entry, {"source": "some/three", "packing": "nf4"}):
        answer = run(capsys, "cache", "--folder", folder, "--clear", "some/three")
    assert answer.code == 1 and "some/three: another process packs its weights; try again later" in answer.err
