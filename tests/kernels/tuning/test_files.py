"""Files of choices: what is written is read, whoever else writes; what cannot be used is never an exception later."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fastpeft_kernels.tuning import files, records
from fastpeft_kernels.tuning.records import UnusableError, Winner

DEVICE = "Some GPU 9000"


def winner(number: int, choice: str = "b") -> Winner:
    return Winner(
        "op", {"tokens": number, "sizes": [1, number], "dropout": True, "name": "x"}, choice, {"a": 2.0, choice: 1.5}
    )


def test_what_is_added_is_read(tmp_path: Path) -> None:
    path = files.file_of(DEVICE, tmp_path / "new" / "folder")
    assert path.name == "some-gpu-9000.json" and files.read(path, DEVICE) == []
    files.add(path, DEVICE, [winner(1), winner(2)])
    files.add(path, DEVICE, [winner(2, "c"), winner(3)])
    assert files.read(path, DEVICE) == [winner(1), winner(2, "c"), winner(3)]
    assert winner(3).case == (3, (1, 3), True, "x")
    assert sorted(file.name for file in path.parent.iterdir()) == ["some-gpu-9000.json", "some-gpu-9000.lock"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    files.add(path, DEVICE, [winner(1)])

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        files.add(path, DEVICE, [winner(2)])
    assert files.read(path, DEVICE) == [winner(1)] and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name", records.stamp())
def test_a_file_of_other_versions_is_stale(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.json"
    files.add(path, DEVICE, [winner(1)])
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, name: "0.0"}))
    with pytest.raises(UnusableError, match=f"measured with {name} 0.0, here is"):
        files.read(path, DEVICE)
    files.add(path, DEVICE, [winner(2)])
    assert files.read(path, DEVICE) == [winner(2)]


def row(**changed: object) -> str:
    good = json.loads(records.to_text(DEVICE, [winner(1)]))
    good["winners"][0].update(changed)
    return json.dumps(good)


WRONG = {
    "empty": (b"", "not JSON"),
    "cut off": (row().encode()[:-20], "not JSON"),
    "deep": (b"[" * 100_000, "not JSON"),
    "no text": (b"\xff\xfe\x00", "codec can't decode"),
    "a list": (b"[]", "an object with a list of winners"),
    "another device": (row().replace("9000", "8000").encode(), "expected device 'Some GPU 9000', got 'Some GPU 8000'"),
    "op": (row(op=3).encode(), r"winners\[0\]: expected names"),
    "choice": (row(choice=["b"]).encode(), r"winners\[0\]: expected names"),
    "key": (row(key=["tokens", 1]).encode(), r"winners\[0\].key: expected strings"),
    "value": (row(key={"tokens": {"x": 1}}).encode(), r"winners\[0\].key: expected strings"),
    "time": (row(us={"a": -1}).encode(), r"winners\[0\].us: expected positive"),
    "beyond floats": (row(us={"a": 10**400}).encode(), r"winners\[0\].us: expected positive numbers below"),
    "a switch": (row(us={"a": True}).encode(), r"winners\[0\].us: expected positive"),
    "infinite": (row(us={"a": float("inf")}).encode(), r"winners\[0\].us: expected positive"),
    "field": (row(more=1).encode(), r"winners\[0\]: expected op, key, choice and us"),
    "huge": (b" " * (files.LARGEST + 1), "expected at most"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_says_why_and_is_replaced(tmp_path: Path, case: str) -> None:
    content, message = WRONG[case]
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UnusableError, match=message):
        files.read(path, DEVICE)
    files.add(path, DEVICE, [winner(2)])
    assert files.read(path, DEVICE) == [winner(2)]


def test_a_failure_that_nobody_thought_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.add(tmp_path / "x.json", DEVICE, [winner(1)])

    def fail(*_: object, **__: object) -> None:
        raise OverflowError("too large")

    monkeypatch.setattr(files, "from_text", fail)
    with pytest.raises(UnusableError, match="OverflowError: too large"):
        files.read(tmp_path / "x.json", DEVICE)


def test_a_folder_in_the_file_s_place(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    with pytest.raises(UnusableError, match="not a file"):
        files.read(tmp_path / "x.json", DEVICE)
