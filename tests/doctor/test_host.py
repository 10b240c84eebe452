"""System, memory, disks, compilers."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from collections import namedtuple
from pathlib import Path

import pytest

from fastpeft.doctor import host
from fastpeft.doctor.findings import Status
from fastpeft.doctor.host import GIB
from tests.doctor.machines import CPU_ONLY, WORKING, only

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("kind", "release", "status", "wsl"),
    [
        ("Linux", "6.8.0-49-generic", Status.ok, 0),
        ("Linux", "5.15.153.1-microsoft-standard-WSL2", Status.ok, 2),
        ("Linux", "4.4.0-19041-Microsoft", Status.warning, 1),
        ("Windows", "11", Status.note, 0),
        ("Darwin", "24.1.0", Status.note, 0),
    ],
)
def test_systems(monkeypatch: pytest.MonkeyPatch, kind: str, release: str, status: Status, wsl: int) -> None:
    monkeypatch.setattr(platform, "system", lambda: kind)
    monkeypatch.setattr(platform, "release", lambda: release)
    found = only(host.system())
    assert found.status is status and found.values["wsl"] == wsl and release in found.text
    assert (f"WSL {wsl}" in found.text) is (wsl > 0)


def test_python() -> None:
    assert only(host.python()).values["version"] == platform.python_version()


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """The group's own limit, its parent's without one, and the root that has no such files."""
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    group(
        tmp_path / "fs/a/b", memory__max="1000\n", memory__current="700\n", memory__stat="anon 1\ninactive_file 200\n"
    )
    group(tmp_path / "fs/a", memory__max="max\n", memory__current="800\n", memory__stat="anon 1\n")
    assert list(host._group_limits(tmp_path / "fs", own)) == [(1000, 500)]


def test_limits_of_older_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/x\n4:memory:/a\n0::/\n")
    files = {"memory__limit_in_bytes": "900", "memory__usage_in_bytes": "300"}
    group(tmp_path / "fs/memory/a", **files, memory__stat="inactive_file 7\ntotal_inactive_file 100\n")
    group(tmp_path / "fs/memory", **files, memory__stat="total_inactive_file 0\n")
    assert list(host._group_limits(tmp_path / "fs", own)) == [(900, 200), (900, 300)]


def test_no_control_groups(tmp_path: Path) -> None:
    assert list(host._group_limits(tmp_path, tmp_path / "none")) == []


def test_a_container_s_limit_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_group_limits", lambda: iter([(3 * GIB, GIB), (2**62, 0)]))
    assert host.available_ram() == (3 * GIB, 2 * GIB)
    found = only(host.ram())
    assert found.status is Status.warning and found.text == "2.0 GiB available of 3.0 GiB"


def test_memory_as_it_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(host, "_group_limits", lambda: iter(()))
    total, available = host.available_ram()
    assert total == psutil.virtual_memory().total and 0 < available <= total


@pytest.mark.parametrize(("available", "status"), [(GIB, Status.warning), (64 * GIB, Status.ok)])
def test_memory(monkeypatch: pytest.MonkeyPatch, available: int, status: Status) -> None:
    monkeypatch.setattr(host, "available_ram", lambda: (128 * GIB, available))
    assert only(host.ram()).status is status


@pytest.mark.parametrize(
    ("free", "statuses"), [(GIB, ["note", "note"]), (9 * GIB, ["ok", "note"]), (99 * GIB, ["ok"] * 2)]
)
def test_disks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, statuses: list[str]) -> None:
    asked: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host, "hub_cache", lambda: tmp_path / "not/yet/there")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(0, 0, free))
    found = list(host.disks())
    assert [finding.name for finding in found] == ["disk here", "disk cache"]
    assert [finding.status.value for finding in found] == statuses
    assert asked == [tmp_path, tmp_path] and found[1].values == {"free_bytes": free, "writable": True}


def test_a_folder_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "hub_cache", lambda: tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    found = list(host.disks())[1]
    assert found.status is Status.warning and "cannot be written to" in found.text


def test_the_cache_is_the_hub_s() -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    assert host.hub_cache() == Path(constants.HF_HUB_CACHE)


def test_the_compiler_is_the_one_that_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'c++ (GCC) 14.2.0'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    found = only(host.compilers(CPU_ONLY))
    assert found.status is Status.ok and found.values["cxx"] == "c++ (GCC) 14.2.0"
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = only(host.compilers(CPU_ONLY))
    assert found.status is Status.note and "CXX names no C++ compiler" in found.text and found.values["cxx"] is None


def test_ninja_beside_this_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert not host._ninja()
    (tmp_path / "ninja").touch(0o755)
    assert host._ninja()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton builds on Linux")
@pytest.mark.parametrize(("cc", "headers"), [(True, True), (False, True), (True, False), (False, False)])
def test_what_triton_builds_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cc: bool, headers: bool) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/bin/{name}" if cc and name == "clang" else None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme=None: str(tmp_path))
    if headers:
        (tmp_path / "Python.h").touch()
    first, second = host.compilers(WORKING)
    assert (first.name, second.name) == ("compiler", "compiler c")
    assert second.status is (Status.ok if cc and headers else Status.warning)
    assert second.values == {"cc": cc, "python_headers": headers}
    assert ("C compiler" in second.text and not cc) or cc
    assert len(list(host.compilers(CPU_ONLY))) == 1  # Triton builds nothing without a GPU
