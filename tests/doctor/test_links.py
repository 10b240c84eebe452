"""The link to the GPU, against what it should allow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastpeft.doctor import links
from fastpeft.doctor.findings import Status
from fastpeft.doctor.system import Smi
from tests.doctor.machines import CPU_ONLY, H200, H200_SMI, WORKING, cuda_torch, machine, only


def test_there_is_none_without_a_gpu() -> None:
    assert list(links.links(CPU_ONLY)) == []


@pytest.mark.parametrize(
    ("speeds", "lanes_now", "status", "said"),
    [
        ((55.1, 54.9), 16, Status.ok, "55.1 GB/s to the GPU, 54.9 GB/s back; PCIe 5 x16"),
        ((26.0, 55.0), 8, Status.note, "PCIe 5 x16, x8 in use"),
        ((55.0, 3.0), 16, Status.note, "3.0 GB/s back"),
        ((350.0, 300.0), 16, Status.ok, "350.0 GB/s"),
    ],
)
def test_speeds(
    monkeypatch: pytest.MonkeyPatch, speeds: tuple[float, float], lanes_now: int, status: Status, said: str
) -> None:
    monkeypatch.setattr(links, "link_speed", lambda index: speeds)
    found = only(links.links(machine(cuda_torch(H200), Smi((replace(H200_SMI, width_now=lanes_now),), "570"))))
    assert (found.name, found.status) == ("link gpu 0", status) and said in found.text
    assert found.values == {
        "to_gpu_gb_per_s": speeds[0], "from_gpu_gb_per_s": speeds[1],
        "pcie_generation": 5, "pcie_lanes": 16, "pcie_lanes_now": lanes_now,
    }  # fmt: skip


def test_a_link_that_nvidia_smi_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "link_speed", lambda index: (1.0, 1.0))
    found = only(links.links(machine(cuda_torch(H200), Smi())))
    assert found.status is Status.ok and found.text == "1.0 GB/s to the GPU, 1.0 GB/s back"
    assert found.values["pcie_lanes"] is None


def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(index: int) -> tuple[float, float]:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(links, "link_speed", fail)
    found = only(links.links(WORKING))
    assert found.status is Status.warning and "not measured: RuntimeError: CUDA error: out of memory" in found.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_link_here() -> None:
    assert all(0.1 < speed < 2000 for speed in links.link_speed(0))
