"""Peak memory, on computations whose memory is known."""

from __future__ import annotations

import pytest
import torch

from fastpeft.bench import memory
from fastpeft.bench.memory import MIB, PeakMemory

CPU = torch.device("cpu")


@pytest.mark.parametrize("kernel_helps", [True, False])
def test_a_peak_that_is_over_is_still_seen(kernel_helps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel_helps:
        monkeypatch.setattr(memory, "_reset_highest", lambda: False)
    with PeakMemory(CPU) as peak:
        big = torch.ones(64 * MIB // 4)
        for _ in range(20):
            big.add_(1)
        del big
    assert 60 < peak.mib < 160


def test_an_earlier_peak_is_not() -> None:
    big = torch.ones(256 * MIB // 4)
    del big
    with PeakMemory(CPU) as peak:
        small = torch.ones(8 * MIB // 4)
    del small
    assert peak.mib < 100


def test_the_peak_of_a_step_on_a_cpu_is_exact() -> None:
    def step() -> None:
        first = torch.ones(MIB // 4)
        second = torch.ones(2 * MIB // 4)
        del first
        torch.ones(MIB // 8).sum()
        del second

    there = torch.ones(MIB)
    assert memory.peak_of_step(step, "cpu") == 3 * MIB
    assert memory.peak_of_step(lambda: there.mul_(1), "cpu") < 100
    assert memory.peak_of_step(lambda: None, "cpu") == 0
