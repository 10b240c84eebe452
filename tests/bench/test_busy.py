"""What of a profiler's events is a GPU's work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from fastpeft.bench.busy import counted


def event(name: str, device: DeviceType, ms: float = 0.0, named: bool = False) -> SimpleNamespace:
    values = {"name": name, "device_type": device, "duration_ns": int(ms * 1e6), "is_user_annotation": named}
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def test_kernels_and_copies_count_and_ranges_do_not() -> None:
    cpu, gpu = DeviceType.CPU, DeviceType.CUDA
    events = [
        event("aten::mm", cpu, 5.0),
        event("cudaLaunchKernel", cpu),
        event("cuLaunchKernelEx", cpu),
        event("cudaMemcpyAsync", cpu),
        event("nvjet_hsh", gpu, 1.5),
        event("Memcpy HtoD", gpu, 0.25),
        event("Step", gpu, 9.0, named=True),
    ]
    found = counted(events)
    assert found.ms == pytest.approx(1.75) and found.launches == 2
