"""bitsandbytes: missing, broken, without its CUDA library, too old."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from fastpeft.doctor import quantised
from fastpeft.doctor.findings import Status
from fastpeft.doctor.machine import Machine, Torch
from fastpeft.doctor.quantised import Native
from fastpeft.integrations import versions
from tests.doctor.machines import CPU_ONLY, WORKING, cuda_torch, machine, only

CPU_LIBRARY = Native("libbitsandbytes_cpu.so", False)
CUDA_LIBRARY = Native("libbitsandbytes_cuda128.so", True)
NO_LIBRARY = Native("", False, "No compatible CUDA binary found")


def pretend(monkeypatch: pytest.MonkeyPatch, native: Native, wrong: str = "") -> list[str]:
    """Returns the devices that 4-bit storage is tried on."""
    devices: list[str] = []
    monkeypatch.setattr(quantised, "installed", lambda name: "0.50.2")
    monkeypatch.setattr(quantised, "native_library", lambda: native)
    monkeypatch.setattr(quantised, "four_bit_error", lambda device: devices.append(device) or wrong)
    return devices


def test_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "installed", lambda name: None)
    found = only(quantised.bitsandbytes(WORKING))
    assert found.status is Status.warning and found.text == "not installed"
    assert "pip install bitsandbytes" in found.advice and found.values["version"] is None


@pytest.mark.parametrize(
    ("facts", "native", "wrong", "status", "said"),
    [
        (WORKING, CUDA_LIBRARY, "", Status.ok, "libbitsandbytes_cuda128.so; 4-bit works on the GPU"),
        (CPU_ONLY, CPU_LIBRARY, "", Status.ok, "libbitsandbytes_cpu.so; 4-bit works on the CPU"),
        (
            WORKING,
            CPU_LIBRARY,
            "no kernel",
            Status.problem,
            "no CUDA library loaded; 4-bit on the GPU fails: no kernel",
        ),
        (WORKING, CPU_LIBRARY, "", Status.warning, "no CUDA library loaded; 4-bit on the GPU works nevertheless"),
        (WORKING, NO_LIBRARY, "x", Status.problem, "no CUDA library loaded (No compatible CUDA binary found)"),
        (WORKING, CUDA_LIBRARY, "values come back wrong", Status.problem, "on the GPU fails: values come back wrong"),
        (CPU_ONLY, CPU_LIBRARY, "x", Status.problem, "4-bit on the CPU fails: x"),
        (CPU_ONLY, Native("", False, "none"), "", Status.note, "no native library; 4-bit works on the CPU without it"),
    ],
)
def test_what_is_loaded_and_whether_it_works(
    monkeypatch: pytest.MonkeyPatch, facts: Machine, native: Native, wrong: str, status: Status, said: str
) -> None:
    devices = pretend(monkeypatch, native, wrong)
    found = only(quantised.bitsandbytes(facts))
    assert found.status is status and said in found.text
    assert devices == ["cuda" if facts is WORKING else "cpu"]
    assert found.values == {
        "version": "0.50.2", "library": native.file or None, "cuda": native.cuda, "four_bit": not wrong,
    }  # fmt: skip


def test_the_advice_names_what_torch_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, CPU_LIBRARY, "x")
    assert "torch's CUDA 12.8" in only(quantised.bitsandbytes(WORKING)).advice
    amd = machine(cuda_torch(*WORKING.torch.gpus, cuda=None, hip="7.0"))
    assert "torch's ROCm 7.0" in only(quantised.bitsandbytes(amd)).advice


def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, CUDA_LIBRARY)
    monkeypatch.setattr(versions.metadata, "version", lambda name: "0.45.0")
    found = only(quantised.bitsandbytes(WORKING))
    assert found.status is Status.warning and "bitsandbytes>=0.49 (0.45.0 is installed)" in found.text


def test_an_import_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "installed", lambda name: "0.50.2")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.cextension", None)
    found = only(quantised.bitsandbytes(CPU_ONLY))
    assert found.status is Status.problem and "cannot be imported: ModuleNotFoundError" in found.text


def test_nothing_is_tried_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = pretend(monkeypatch, CPU_LIBRARY)
    assert list(quantised.bitsandbytes(machine(Torch(error="broken")))) == [] and not devices


def test_the_installed_one() -> None:
    pytest.importorskip("bitsandbytes")
    native = quantised.native_library()
    assert native.file.startswith("libbitsandbytes_") and not native.error
    assert quantised.four_bit_error("cpu") == ""


def test_a_library_that_could_not_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes puts an object in its place that has every attribute."""
    extension = pytest.importorskip("bitsandbytes.cextension")
    monkeypatch.setattr(extension, "lib", extension.ErrorHandlerMockBNBNativeLibrary("\nlibcudart.so.13: no such file"))
    assert quantised.native_library() == Native("", False, "libcudart.so.13: no such file")


def test_values_that_come_back_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    right = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *given: right(*given).roll(1))
    assert "values come back wrong" in quantised.four_bit_error("cpu")
    broken = ModuleType("bitsandbytes.functional")
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", broken)
    assert quantised.four_bit_error("cpu").startswith("ImportError: ")
