"""Machines that are not here, as facts for the checks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastpeft.doctor.findings import Finding
from fastpeft.doctor.machine import Machine, Torch, TorchGpu
from fastpeft.doctor.system import Smi, SmiGpu

GIB = 2**30
H200_SMI = SmiGpu("NVIDIA H200", "uuid-h200", 90, 140 * GIB, 139 * GIB, 5, 16, 16)
H200 = TorchGpu(0, "NVIDIA H200", 90, 140 * GIB, 139 * GIB, "uuid-h200")
T4 = TorchGpu(1, "Tesla T4", 75, 15 * GIB, 14 * GIB, "uuid-t4")
CPU_TORCH = Torch("2.13.0+cpu")
SMI = Smi((H200_SMI,), "570.86.15")


def cuda_torch(*gpus: TorchGpu, **changes: Any) -> Torch:
    facts = {"version": "2.13.0+cu128", "cuda": "12.8", "architectures": ("sm_75", "sm_80", "sm_90", "sm_120")}
    return Torch(**{**facts, "gpus": gpus, **changes})


def machine(torch: Torch, smi: Smi = SMI, cuda: tuple[int, int] | None = (12, 8), **changes: Any) -> Machine:
    return Machine(smi, torch, cuda, **changes)


CPU_ONLY = machine(CPU_TORCH, Smi(), None)
WORKING = machine(cuda_torch(H200))


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding
