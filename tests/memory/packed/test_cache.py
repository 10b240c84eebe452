"""What can happen to the packed weights of a checkpoint on disk."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastpeft.memory.packed import cache as packed_cache
from fastpeft.memory.packed import entries as packed_entries
from fastpeft.memory.packed import files as packed_files
from fastpeft.memory.packed.cache import PackedCache
from fastpeft.memory.packed.files import Packed

ABOUT = {"source": "some/model", "packing": "nf4"}
FORK = multiprocessing.get_context("fork")


def weight(number: int) -> Packed:
    codes = torch.full((32, 1), number, dtype=torch.uint8)
    return Packed(f"layer{number}.weight", f"old{number}.weight", {"": codes, ".absmax": torch.rand(3) + number})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of an entry; every weight has a file of its own, and the disk as much room as it likes."""
    monkeypatch.setattr(packed_cache, "FILE_BYTES", 1)
    monkeypatch.setattr(packed_cache, "SPARE_BYTES", 0)
    return tmp_path / "cache" / "entry"


def fill(folder: Path, count: int = 3) -> list[Packed]:
    weights = [weight(number) for number in range(count)]
    with PackedCache(folder, ABOUT) as cache:
        for one in weights:
            cache.add(one)
    return weights


def read(folder: Path) -> dict[str, dict[str, torch.Tensor] | None]:
    with PackedCache(folder, ABOUT) as cache:
        return {target: cache.read(target) for target in cache.sources}


def check_holds(folder: Path, weights: list[Packed]) -> None:
    found = read(folder)
    assert found.keys() == {one.target for one in weights}
    for one in weights:
        parts = found[one.target]
        assert parts is not None and parts.keys() == one.parts.keys()
        assert all(torch.equal(parts[name], part) for name, part in one.parts.items())


def in_child(work: Callable[[], None]) -> Any:
    process = FORK.Process(target=work)
    process.start()
    return process


def test_what_was_added_is_found(folder: Path) -> None:
    weights = fill(folder)
    check_holds(folder, weights)
    with PackedCache(folder, ABOUT) as cache:
        assert cache.sources == {one.target: one.source for one in weights} and cache.read("other") is None
    assert json.loads((folder / "manifest.json").read_text())["finished"] is True
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    for path in folder.glob("*.safetensors"):
        assert path.stat().st_mode & 0o077 == 0


def test_files_are_safetensors_of_every_dtype(tmp_path: Path) -> None:
    parts = {f".{dtype}".removeprefix(".torch"): torch.arange(7).to(dtype) for dtype in packed_files._DTYPES}
    path = packed_files.write(tmp_path, [Packed("a", "b", parts), Packed("c", "d", {"": torch.zeros(0)})])
    found = load_file(path)
    assert all(
        torch.equal(found["a" + name], part) and part.dtype == found["a" + name].dtype for name, part in parts.items()
    )
    packed_files.check(path)
    assert packed_files.contents(path) == {"a": ("b", tuple(sorted(parts))), "c": ("d", ("",))}


def flip(data: bytes) -> bytes:
    return data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]


@pytest.mark.parametrize(
    "damage",
    [flip, lambda data: data[:-5], lambda data: data[:40], lambda data: b"", lambda data: b"\xff" * len(data)],
    ids=["flipped", "truncated", "header cut", "empty", "huge header"],
)
def test_damage_is_warned_of_once_and_the_file_goes(
    folder: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    weights = fill(folder)
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(damage(path.read_bytes()))
    found = {target: parts for target, parts in read(folder).items() if parts is not None}
    assert len(found) == 2 and not path.exists() and len(caplog.records) == 1
    assert f"packed weights are made anew, for {path}: " in caplog.text
    with PackedCache(folder, ABOUT) as cache:
        for one in weights:
            if cache.read(one.target) is None:
                cache.add(one)
    check_holds(folder, weights)


def test_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    fill(folder, 1)
    (path,) = folder.glob("*.safetensors")
    path.rename(tmp_path / path.name)
    path.symlink_to(tmp_path / path.name)
    assert not read(folder) and (tmp_path / path.name).exists() and not path.is_symlink()


def test_a_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    syncs = []

    def full(file: int) -> None:
        syncs.append(file)
        if len(syncs) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    fill(folder, 5)
    assert len(syncs) == 3 and len(caplog.records) == 1
    assert "packed weights are not kept" in caplog.text and "No space left" in caplog.text
    assert not list(folder.glob("*.safetensors")) and not list(folder.glob("*.tmp"))


def test_a_limit_on_files(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with PackedCache(folder, ABOUT) as cache:
            cache.add(Packed("a", "a", {"": torch.zeros(4000, dtype=torch.uint8)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "packed weights are not kept" in caplog.text and {path.name for path in folder.iterdir()} <= {
        "lock",
        "manifest.json",
    }


def test_room_is_left_for_checkpoints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_cache, "SPARE_BYTES", 1 << 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 30))  # type: ignore[attr-defined]
    fill(folder)
    assert "less than 1 GiB would be left on the disk" in caplog.text and not list(folder.glob("*.safetensors"))


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    fill(tmp_path / "file" / "entry")
    assert len(caplog.records) == 1 and "packed weights are not kept" in caplog.text


def test_a_finished_entry_is_read_where_nothing_can_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = fill(folder)

    def refused(*args: Any, **named: Any) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "utime", refused)
    monkeypatch.setattr(os, "replace", refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    check_holds(folder, weights)


def test_what_a_killed_process_packed_is_found(folder: Path) -> None:
    weights = [weight(number) for number in range(5)]

    def work() -> None:
        with PackedCache(folder, ABOUT) as cache:
            for one in weights[:3]:
                cache.add(one)
            (folder / "half.tmp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    child = in_child(work)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert json.loads((folder / "manifest.json").read_text())["finished"] is False
    check_holds(folder, weights[:3])
    assert not list(folder.glob("*.tmp"))


def test_a_second_process_waits_and_packs_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = [weight(number) for number in range(3)]
    began, go = FORK.Event(), FORK.Event()

    def work() -> None:
        with PackedCache(folder, ABOUT) as cache:
            began.set()
            go.wait(30)
            for one in weights:
                cache.add(one)

    child = in_child(work)
    assert began.wait(30)
    assert not packed_entries.clear(packed_entries.entries(folder.parent)[0]), "in use"
    threading.Timer(0.3, go.set).start()
    check_holds(folder, weights)
    child.join(30)
    assert child.exitcode == 0 and "another process packs these weights; waiting for it" in caplog.text


def test_entries_are_listed_and_cleared(folder: Path) -> None:
    fill(folder)
    (folder.parent / "stranger").mkdir()
    (folder.parent / "stranger" / "manifest.json").write_text("{")
    (entry,) = packed_entries.entries(folder.parent)
    assert (entry.source, entry.packing, entry.finished) == ("some/model", "nf4", True) and entry.bytes > 3 * 32
    (folder / "mine.txt").write_text("kept")
    assert packed_entries.clear(entry) and [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert not packed_entries.entries(folder.parent) and not packed_entries.entries(folder / "nowhere")


def test_a_manifest_too_deep_is_none(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text("[" * 100_000)
    assert not packed_entries.entries(folder.parent)
    with PackedCache(folder, ABOUT):
        pass
    assert packed_entries.entries(folder.parent)[0].finished


def test_a_key_follows_content(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(300_000))
    os.utime(file, (1, 1))
    first = packed_entries.key_of([file], {"a": 1})
    assert packed_entries.key_of([file], {"a": 1}) == first != packed_entries.key_of([file], {"a": 2})
    changed = bytearray(300_000)
    changed[20_000] = 1
    file.write_bytes(changed)
    os.utime(file, (1, 1))
    assert packed_entries.key_of([file], {"a": 1}) != first, "same name, size and time"


def test_a_change_between_the_samples_is_found(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(3_000_000))
    os.utime(file, (1, 1))
    first = packed_entries.key_of([file], {})
    with open(file, "r+b") as opened:
        opened.seek(100_000)
        opened.write(b"1")
    os.utime(file, (1, 1))
    assert packed_entries.key_of([file], {}) != first


def test_the_hubs_files_go_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("0a" * 32)
    blob.write_bytes(b"12345678{}")
    keys = []
    for snapshot in ("one", "two"):
        (tmp_path / snapshot).mkdir()
        (tmp_path / snapshot / "model.safetensors").symlink_to(f"../blobs/{blob.name}")
        keys.append(packed_entries.key_of([tmp_path / snapshot / "model.safetensors"], {}))
        os.utime(blob, (1, 1))
    assert keys[0] == keys[1]
    file = tmp_path / "two" / "model.safetensors"
    file.write_bytes(b"87654321{}")  # through the link, as saving into a snapshot does
    assert packed_entries.key_of([file], {}) != keys[1]


def test_not_every_folder_of_blobs_is_the_hubs(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    blob, link = tmp_path / "blobs" / "weights", tmp_path / "model.safetensors"
    blob.write_bytes(b"12345678{}")
    link.symlink_to(blob)
    first = packed_entries.key_of([link], {})
    os.utime(blob, (1, 1))
    assert packed_entries.key_of([link], {}) != first
