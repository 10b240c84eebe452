"""nvidia-smi, real processes on the path, with what it is known to print; and the PCI bus."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fastpeft.doctor import system
from fastpeft.doctor.system import Smi, SmiGpu, answer, nvidia_on_bus, nvidia_smi, parsed, smi_cuda

H200 = "NVIDIA H200, GPU-11112222-3333-4444-5555-666677778888, 570.86.15, 143771, 143167, 5, 16, 16, 9.0"
GB10 = "NVIDIA GB10, GPU-aaaa, 580.95.05, [N/A], [N/A], 1, 1, 1, 12.1"
HEAD = "| NVIDIA-SMI 570.86.15    Driver Version: 570.86.15    CUDA Version: {}  |"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path with a place for a fake nvidia-smi, and what its scripts need."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(system, "_WSL_FOLDER", str(tmp_path / "none"))
    return tmp_path / "nvidia-smi"


def write(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_without_nvidia_smi(smi: Path) -> None:
    assert nvidia_smi() == Smi() and smi_cuda() is None


def test_gpus_and_driver(smi: Path) -> None:
    write(smi, f"printf '%s\\n' '{H200}' '{GB10}'")
    seen = nvidia_smi()
    h200 = SmiGpu("NVIDIA H200", "11112222-3333-4444-5555-666677778888", 90, 143771 * 2**20, 143167 * 2**20, 5, 16, 16)
    assert seen.gpus == (h200, SmiGpu("NVIDIA GB10", "aaaa", 121, None, None, 1, 1, 1))
    assert seen.driver == "570.86.15" and not seen.error


def test_a_driver_that_does_not_know_capabilities(smi: Path) -> None:
    old = H200.rpartition(",")[0]
    refusal = 'Field "compute_cap" is not a valid field to query.'
    write(smi, f"case $1 in *compute_cap*) echo '{refusal}'; exit 2;; *) echo '{old}';; esac")
    (gpu,) = nvidia_smi().gpus
    assert gpu.name == "NVIDIA H200" and gpu.capability is None and gpu.generation == 5


def test_one_that_fails(smi: Path) -> None:
    said = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    write(smi, f'echo "{said}"; exit 9')
    assert nvidia_smi() == Smi(error=said) and smi_cuda() is None


def test_one_that_hangs(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = smi.parent / "pid"
    write(smi, f"echo $$ > {pid}; exec sleep 60")
    monkeypatch.setattr(system, "NVIDIA_SMI_LIMIT_S", 0.3)
    started = time.monotonic()
    assert nvidia_smi() == Smi(error="nvidia-smi did not answer in 0.3 s", hangs=True)
    assert time.monotonic() - started < 10
    with pytest.raises(ProcessLookupError):  # it was killed
        os.kill(int(pid.read_text()), 0)


def test_one_that_cannot_be_executed(smi: Path) -> None:
    smi.write_text("not a program")
    smi.chmod(0o755)
    assert "Exec format error" in nvidia_smi().error


@pytest.mark.parametrize(
    ("head", "cuda"),
    [(HEAD.format("12.8"), (12, 8)), ("| CUDA UMD Version: 13.2 |", (13, 2)), (HEAD.format("N/A"), None)],
)
def test_cuda_of_the_driver(smi: Path, head: str, cuda: tuple[int, int] | None) -> None:
    write(smi, f"echo '{head}'")
    assert smi_cuda() == cuda


def test_answers_of_commands() -> None:
    assert answer("sh", "-c", "echo yes", limit_s=10) == "yes\n"
    with pytest.raises(RuntimeError, match=r"^exit code 4$"):
        answer("sh", "-c", "exit 4", limit_s=10)
    with pytest.raises(FileNotFoundError):
        answer("no-such-command-anywhere", limit_s=10)


@pytest.mark.parametrize(
    ("vendor", "kind", "found"),
    [("0x10de", "0x030200", True), ("0x10de", "0x040300", False), ("0x1002", "0x030000", False)],
)
def test_gpus_on_the_bus(tmp_path: Path, vendor: str, kind: str, found: bool) -> None:
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    assert nvidia_on_bus(tmp_path) is found
    assert not nvidia_on_bus(tmp_path / "nowhere")


def test_versions() -> None:
    assert parsed("12.8.1") == (12, 8) and parsed("13.0") == (13, 0) and parsed(None) is None
    assert system.cuda_version(12080) == (12, 8) and system.dotted((12, 8)) == "12.8"
