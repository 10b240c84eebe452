"""Triton and its assembler."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastpeft.doctor import assemblers
from fastpeft.doctor.findings import Status
from fastpeft_kernels.common import device
from tests.doctor.machines import CPU_ONLY, H200, WORKING, cuda_torch, machine, only

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    device._capability.cache_clear()
    device._version_of.cache_clear()
    for name in assemblers.OVERRIDES:
        monkeypatch.delenv(name, raising=False)


def write_ptxas(folder: Path, version: str) -> str:
    path = folder / "ptxas"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.80'\n")
    path.chmod(0o755)
    return str(path)


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)


def test_a_ptxas_that_is_known_bad_on_sm_90(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, (9, 0))
    path = write_ptxas(tmp_path, "12.8")
    monkeypatch.setattr(device, "ptxas_path", lambda capability: path)
    found = only(assemblers.ptxas(WORKING))
    assert (found.name, found.status) == ("ptxas sm_90", Status.warning)
    assert found.values == {"path": path, "version": "12.8", "safe": False}
    assert "chained dots need ptxas 13.3 or newer" in found.text and "TRITON_PTXAS_" in found.advice


def test_a_newer_ptxas_chosen_by_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, (9, 0))
    path = write_ptxas(tmp_path, "13.3")
    monkeypatch.setenv(device.ptxas_variable(90), path)
    found = only(assemblers.ptxas(WORKING))
    assert found.status is Status.ok and found.text == f"13.3, {path}" and found.values["safe"] is True


def test_one_finding_for_each_kind_of_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, (8, 0))
    a100, other = replace(H200, index=0, capability=80), replace(H200, index=1, capability=80)
    found = only(assemblers.ptxas(machine(cuda_torch(a100, other))))
    assert (found.name, found.status) == ("ptxas sm_80", Status.ok) and "Triton's own" in found.text


def test_without_a_gpu_all_assemblers_are_listed() -> None:
    found = list(assemblers.ptxas(CPU_ONLY))
    assert [finding.name for finding in found] == ["ptxas sm_90", "ptxas sm_100"]
    assert all(finding.status is Status.ok and finding.values["safe"] is None for finding in found)


def test_no_ptxas_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "ptxas_path", lambda capability: None)
    found = only(assemblers.ptxas(WORKING))
    assert found.status is Status.warning and found.advice.startswith("Reinstall triton: ")
    assert {finding.status for finding in assemblers.ptxas(CPU_ONLY)} == {Status.note}


def test_the_variable_names_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "nowhere"))
    override, *rest = assemblers.ptxas(CPU_ONLY)
    assert (override.name, override.status) == ("TRITON_PTXAS_PATH", Status.warning)
    assert "does not exist" in override.text
    assert all("Triton's own" in finding.text for finding in rest)  # what the text claims that Triton does


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_variable_names_what_cannot_be_executed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    pretend(monkeypatch, (9, 0))
    path, variable = tmp_path / "ptxas", device.ptxas_variable(90)
    path.write_text("") if kind == "file" else path.mkdir()
    monkeypatch.setenv(variable, str(path))
    override, asked = assemblers.ptxas(WORKING)
    assert override.status is Status.problem and "cannot be executed" in override.text
    assert (asked.status, asked.text) == (Status.warning, "none that runs")
    assert asked.advice.startswith(f"Unset {variable}: ")
    assert next(iter(assemblers.ptxas(CPU_ONLY))).status is Status.warning


def test_triton_without_a_gpu() -> None:
    found = only(assemblers.triton(CPU_ONLY))
    assert found.status is Status.ok and found.values["runs"] is None and found.values["version"]


@pytest.mark.parametrize(("wrong", "status"), [("", Status.ok), ("RuntimeError: no C compiler", Status.problem)])
def test_a_kernel_is_tried_on_a_gpu(monkeypatch: pytest.MonkeyPatch, wrong: str, status: Status) -> None:
    monkeypatch.setattr(assemblers, "decode_error", lambda: wrong)
    found = only(assemblers.triton(WORKING))
    assert found.status is status and wrong in found.text and found.values["runs"] is not bool(wrong)


def test_trying_a_kernel_where_it_cannot_run_is_no_crash() -> None:
    if torch.cuda.is_available():
        assert assemblers.decode_error() == ""
    else:
        assert "CUDA" in assemblers.decode_error() or "NVIDIA" in assemblers.decode_error()


@pytest.mark.parametrize("version", [None, "3.7.1"])
def test_without_triton(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(assemblers, "installed", lambda name: version)
    monkeypatch.setattr(sys, "platform", "linux")
    assert only(assemblers.triton(CPU_ONLY)).status is Status.note
    found = only(assemblers.triton(WORKING))
    assert found.status is Status.warning and found.values == {"version": version, "runs": None}
    assert ("cannot be imported" if version else "not installed") in found.text
    assert list(assemblers.ptxas(WORKING)) == []
    monkeypatch.setattr(sys, "platform", "win32")
    assert "Nothing to do" in only(assemblers.triton(WORKING)).advice
