"""GPUs, driver and torch: what fits and what does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastpeft.doctor import gpu
from fastpeft.doctor.findings import Status
from fastpeft.doctor.machine import Machine, Torch, TorchGpu, look_at_torch
from fastpeft.doctor.system import Smi, SmiGpu
from fastpeft.integrations import versions
from tests.doctor.machines import CPU_ONLY, CPU_TORCH, GIB, H200, H200_SMI, SMI, T4, WORKING, cuda_torch, machine, only


@pytest.fixture(autouse=True)
def nothing_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_machine_without_gpu_is_a_note_and_no_problem() -> None:
    assert not CPU_ONLY.has_gpu and CPU_ONLY.device == "cpu"
    assert only(gpu.gpus(CPU_ONLY)).status is Status.note
    assert only(gpu.torch_build(CPU_ONLY)).status is Status.ok
    assert list(gpu.driver(CPU_ONLY)) == []


def test_a_gpu_that_works() -> None:
    found = only(gpu.gpus(WORKING))
    assert (found.name, found.status) == ("gpu 0", Status.ok)
    assert found.text == "NVIDIA H200, capability 9.0, 140.0 GiB, 139.0 GiB free"
    assert found.values == {
        "name": "NVIDIA H200", "capability": "9.0", "total_bytes": 140 * GIB, "free_bytes": 139 * GIB,
    }  # fmt: skip
    built = only(gpu.torch_build(WORKING))
    assert built.status is Status.ok and built.text == "2.13.0+cu128, built for CUDA 12.8, sees 1 GPU"
    assert only(gpu.driver(WORKING)).values == {"version": "570.86.15", "cuda": "12.8"}
    assert only(gpu.bf16(WORKING)).values == {"native": True}


def test_a_gpu_and_a_cpu_build_of_torch() -> None:
    found = only(gpu.torch_build(machine(CPU_TORCH)))
    assert found.status is Status.problem and "built for CPUs only" in found.text
    assert "torch for CUDA 12.8 or older" in found.advice
    assert only(gpu.gpus(machine(CPU_TORCH))).values["name"] == "NVIDIA H200"  # by nvidia-smi


def test_a_gpu_that_only_its_device_file_shows() -> None:
    hidden = machine(CPU_TORCH, Smi(), None, device_node=True)
    assert only(gpu.torch_build(hidden)).status is Status.problem
    assert only(gpu.gpus(hidden)).text == "neither nvidia-smi nor torch shows one"


def test_a_driver_that_is_too_old() -> None:
    found = only(gpu.torch_build(machine(cuda_torch(cuda="13.0"), cuda=(12, 4))))
    assert found.status is Status.problem and "driver is too old, it supports CUDA up to 12.4" in found.text
    assert "Update the driver" in found.advice and "torch for CUDA 12" in found.advice


def test_a_driver_of_an_older_minor_version_is_a_note() -> None:
    found = only(gpu.torch_build(machine(cuda_torch(H200), cuda=(12, 4))))
    assert found.status is Status.note and "CUDA up to 12.4" in found.text


def test_gpus_that_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    found = only(gpu.torch_build(machine(cuda_torch())))
    assert found.status is Status.note and "CUDA_VISIBLE_DEVICES='7'" in found.text


def test_a_gpu_that_torch_cannot_use_for_another_reason() -> None:
    found = only(gpu.torch_build(machine(cuda_torch(complaint="CUDA unknown error"))))
    assert found.status is Status.problem and found.text.endswith("though there is one: CUDA unknown error")


@pytest.mark.parametrize(
    ("capability", "architectures", "served"),
    [
        (90, ("sm_90",), True),
        (89, ("sm_80", "sm_86"), True),
        (120, ("sm_80", "sm_90"), False),
        (120, ("sm_90", "compute_90"), True),
        (90, ("sm_90a",), True),
        (121, ("sm_120a",), False),
        (70, ("sm_75", "sm_80"), False),
        (70, (), True),
    ],
)
def test_kernels_for_the_gpu(capability: int, architectures: tuple[str, ...], served: bool) -> None:
    torch_facts = cuda_torch(replace(H200, capability=capability), architectures=architectures)
    found = only(gpu.torch_build(machine(torch_facts)))
    assert found.status is (Status.ok if served else Status.problem)
    assert ("has no kernels for gpu 0" in found.text) is not served


def test_torch_that_cannot_be_imported() -> None:
    found = only(gpu.torch_build(machine(Torch(error="OSError: libcudart.so.13: cannot open"))))
    assert found.status is Status.problem and "libcudart.so.13" in found.text


def test_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.metadata, "version", lambda name: "2.9.1")
    found = only(gpu.torch_build(WORKING))
    assert found.status is Status.problem and "torch>=2.11 (2.9.1 is installed)" in found.text
    assert found.advice == 'Run pip install --upgrade "torch>=2.11".'


def test_nvidia_smi_that_hangs() -> None:
    hanging = Smi(error="nvidia-smi did not answer in 20 s", hangs=True)
    assert only(gpu.gpus(machine(CPU_TORCH, hanging, None))).status is Status.problem
    working = machine(cuda_torch(H200), hanging)
    assert only(gpu.gpus(working)).status is Status.ok
    found = only(gpu.driver(working))
    assert found.status is Status.warning and "did not answer in 20 s" in found.text


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (machine(CPU_TORCH, Smi(), None, on_bus=True), "no driver answers for the one that is plugged in"),
        (machine(CPU_TORCH, Smi(error="No devices were found"), None), "(No devices were found)"),
    ],
)
def test_a_gpu_without_a_driver_is_a_warning(facts: Machine, said: str) -> None:
    found = only(gpu.gpus(facts))
    assert found.status is Status.warning and said in found.text and "driver" in found.advice
    assert only(gpu.torch_build(facts)).status is Status.ok


@pytest.mark.parametrize(
    ("seen", "status", "said"),
    [
        (replace(H200, free_bytes=GIB), Status.note, "1.0 GiB free"),
        (replace(H200, free_bytes=None), Status.ok, "unknown free"),
        (replace(H200, capability=61), Status.warning, "capability 6.1"),
        (T4, Status.ok, "capability 7.5"),
    ],
)
def test_gpus_that_are_full_or_old(seen: TorchGpu, status: Status, said: str) -> None:
    found = only(gpu.gpus(machine(cuda_torch(seen))))
    assert found.status is status and said in found.text


def test_memory_that_nvidia_smi_does_not_tell() -> None:
    shared = Smi((SmiGpu("NVIDIA GB10", capability=121),), "580.95.05")
    found = only(gpu.gpus(machine(CPU_TORCH, shared)))
    assert found.text == "NVIDIA GB10, capability 12.1, memory shared or unknown"


def test_an_amd_gpu_is_a_note() -> None:
    amd = machine(cuda_torch(replace(H200, name="MI300X", capability=None), cuda=None, hip="7.0"), Smi(), None)
    assert only(gpu.gpus(amd)).status is Status.note and only(gpu.torch_build(amd)).status is Status.ok


def test_bf16_is_emulated_before_8_0() -> None:
    found = only(gpu.bf16(machine(cuda_torch(H200, T4))))
    assert found.status is Status.note and found.text == "emulated on gpu 1" and found.values == {"native": False}


@pytest.mark.parametrize(("able", "status"), [(["amx_bf16", "avx2"], Status.ok), (["avx2"], Status.note)])
def test_bf16_on_cpus(monkeypatch: pytest.MonkeyPatch, able: list[str], status: Status) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(able, True) | {"avx512_bf16": False})
    assert only(gpu.bf16(CPU_ONLY)).status is status


def test_gpus_are_matched_by_identity_and_not_by_number() -> None:
    other = replace(H200_SMI, uuid="uuid-t4", name="Tesla T4")
    two = machine(cuda_torch(H200, T4), Smi((other, H200_SMI)))
    assert [two.smi_gpu(seen) for seen in two.torch.gpus] == [H200_SMI, other]
    alone = machine(cuda_torch(replace(H200, uuid="")), SMI)
    assert alone.smi_gpu(alone.torch.gpus[0]) == H200_SMI
    unknown = machine(cuda_torch(replace(H200, uuid=""), T4), Smi((other, H200_SMI)))
    assert unknown.smi_gpu(unknown.torch.gpus[0]) is None


def test_torch_as_it_is_here() -> None:
    seen = look_at_torch()
    assert seen.version == torch.__version__ and not seen.error
    assert len(seen.gpus) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_what_torch_says_instead_of_showing_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def old() -> bool:
        import warnings

        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=2)
        return False

    def broken() -> bool:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", old)
    assert "driver on your system is too old" in look_at_torch().complaint
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    seen = look_at_torch()
    assert seen.complaint == "RuntimeError: CUDA error: out of memory" and not seen.gpus
