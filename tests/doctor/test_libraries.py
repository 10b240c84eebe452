"""CUDA libraries: found in a process's map, and told apart from torch's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastpeft.doctor import libraries
from fastpeft.doctor.findings import Status
from tests.doctor.machines import CPU_ONLY, WORKING, only

MAPS = """\
7f00-7f01 r-xp 00000000 08:01 42   {site}/nvidia/cublas/lib/libcublasLt.so.12
7f01-7f02 r-xp 00000000 08:01 42   {site}/nvidia/cublas/lib/libcublas.so.12
7f02-7f03 r-xp 00000000 08:01 42   /usr/local/cuda/lib64/libcudart.so.12.8.90
7f03-7f04 rw-p 00000000 00:00 0    [heap]
"""


def test_other_builds_have_none() -> None:
    assert list(libraries.cuda_libraries(CPU_ONLY)) == []


def test_what_is_loaded() -> None:
    assert libraries.loaded_libraries(MAPS.format(site="/site")) == {
        "cublas": Path("/site/nvidia/cublas/lib/libcublas.so.12"),
        "cudart": Path("/usr/local/cuda/lib64/libcudart.so.12.8.90"),
    }


@pytest.mark.parametrize("brings_its_own", [True, False])
def test_libraries_from_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, brings_its_own: bool) -> None:
    (tmp_path / "torch").mkdir()
    if brings_its_own:
        (tmp_path / "nvidia").mkdir()
    (tmp_path / "maps").write_text(MAPS.format(site=tmp_path))
    monkeypatch.setattr(libraries, "_MAPS", tmp_path / "maps")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(libraries, "_runtime_version", lambda path: f"12.8 {path.name}")
    monkeypatch.setattr(libraries, "_cublas_version", lambda path: f"12.8.4 {path.name}")
    found = only(libraries.cuda_libraries(WORKING))
    assert "cudart 12.8 libcudart.so.12.8.90, cublas 12.8.4 libcublas.so.12, cudnn 9.10.2" in found.text
    assert found.status is (Status.warning if brings_its_own else Status.ok)
    assert found.values["foreign"] == (["/usr/local/cuda/lib64/libcudart.so.12.8.90"] if brings_its_own else [])


def test_where_nothing_can_be_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(libraries, "_MAPS", tmp_path / "none")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    found = only(libraries.cuda_libraries(WORKING))
    assert found.status is Status.note and found.text == "cudart unknown, cublas unknown, cudnn unknown"
