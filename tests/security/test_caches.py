"""Caches into which somebody else can write are not used: compiled code, packed weights, measured choices."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from fastpeft.memory.packed.cache import PackedCache
from fastpeft.memory.packed.files import Packed, write
from fastpeft_kernels.common.private import others_may_write, private_folder
from fastpeft_kernels.native import build, native_library
from fastpeft_kernels.tuning import files
from fastpeft_kernels.tuning.records import UnusableError, Winner

WINNERS = [Winner("some_op", {"rows": 1}, "some", {"some": 1.0})]
somebody_else = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can give files away")


def test_a_new_folder_is_this_user_s_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = private_folder(tmp_path / "above" / "folder")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(each.stat().st_mode) for each in (made.parent, made)][1] == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722, 0o1777])
def test_folders_that_others_may_write(mode: int, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(mode)
    with pytest.raises(PermissionError, match=f"that only this user may write, got one of mode {mode:o}"):
        private_folder(tmp_path / "folder")


@somebody_else
def test_folders_of_others(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o700)
    os.chown(tmp_path / "folder", 12345, -1)
    with pytest.raises(PermissionError, match="got one of user 12345"):
        private_folder(tmp_path / "folder")
    os.chown(tmp_path, 12345, -1)
    with pytest.raises(PermissionError, match="where nobody else may rename it"):
        private_folder(tmp_path / "another")


def test_a_folder_that_others_may_rename(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="where nobody else may rename it"):
        private_folder(tmp_path / "folder")
    with pytest.raises(PermissionError, match="where nobody else may rename it"):
        private_folder(tmp_path / "between" / "folder")
    tmp_path.chmod(0o1777)  # as /tmp is
    private_folder(tmp_path / "folder")


def test_a_link_is_judged_by_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(PermissionError, match="of mode 777"):
        private_folder(tmp_path / "link")
    (tmp_path / "open").chmod(0o700)
    assert private_folder(tmp_path / "link") == (tmp_path / "open").resolve()  # whoever made the link may change it


@pytest.mark.parametrize("what", ["folder", "library"])
def test_code_that_others_may_have_put_there_is_not_loaded(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PyTorch serves, and one line says why."""
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    monkeypatch.setattr(build, "_run", lambda command, keep: Path(command[5]).write_bytes(b"no library"))
    native_library.cache_clear()
    try:
        planted = build._built()
        (tmp_path / "fastpeft" if what == "folder" else planted).chmod(0o777)
        assert native_library() is None
    finally:
        native_library.cache_clear()
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("the C++ kernels for CPU could not be built, PyTorch serves instead: ")
    assert "only this user may write, got one of mode 777" in said


def packed(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return write(folder, [Packed("a.weight", "a.weight", {"": torch.zeros(4, dtype=torch.uint8)})])


def test_packed_weights_of_a_folder_that_others_may_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed(tmp_path / "entry")
    with PackedCache(tmp_path / "entry", {}) as cache:
        assert cache.read("a.weight") is not None
    (tmp_path / "entry").chmod(0o777)
    with caplog.at_level(logging.WARNING), PackedCache(tmp_path / "entry", {}) as cache:
        assert cache.read("a.weight") is None
        cache.add(Packed("b.weight", "b.weight", {"": torch.zeros(4, dtype=torch.uint8)}))
    (said,) = [record.message for record in caplog.records]
    assert said.startswith(f"packed weights are not kept in {tmp_path / 'entry'}: ") and "of mode 777" in said


def test_a_packed_file_that_others_may_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = packed(tmp_path / "entry")
    file.chmod(0o666)
    with PackedCache(tmp_path / "entry", {}) as cache:
        assert cache.read("a.weight") is None and not file.exists()
    assert "a file of mode 666" in caplog.text


@pytest.mark.parametrize("what", ["folder", "file"])
def test_choices_that_others_may_have_written(what: str, tmp_path: Path) -> None:
    path = tmp_path / "tuning" / "some.json"
    files.add(path, "some", WINNERS)
    assert files.read(path, "some") == WINNERS and others_may_write(path.parent) is None
    (path.parent if what == "folder" else path).chmod(0o777)
    with pytest.raises(UnusableError, match="that only this user may write, got one of mode 777"):
        files.read(path, "some")
    if what == "folder":
        with pytest.raises(PermissionError):
            files.add(path, "some", WINNERS)
