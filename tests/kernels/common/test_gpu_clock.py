"""The clock on a GPU, on a pretended one: only calls that the host was done with in time count, if there are any."""

from __future__ import annotations

import pytest
import torch

from fastpeft_kernels.common.gpu_clock import GpuClock


class Device:
    """Fills memory at 100 us a time, and is given calls that take the host 350 us and itself 10.

    An event's time is the device's; `now` is the host's. In us.
    """

    def __init__(self) -> None:
        self.now = self.free = 0.0
        self.host, self.calls = 350.0, 0

    def work(self, us: float) -> None:
        self.free = max(self.now, self.free) + us

    def call(self) -> None:
        self.calls += 1
        self.now += self.host
        self.work(10.0)

    def zero_(self) -> None:
        self.work(100.0)

    def event(self, enable_timing: bool) -> Event:
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.at = max(self.device.now, self.device.free)

    def query(self) -> bool:
        return self.at <= self.device.now

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) / 1e3


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(torch.cuda, "Event", found.event)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: found)
    return found


def test_the_device_is_kept_busy_until_the_host_is_done(device: Device) -> None:
    clock = GpuClock()
    assert clock.once_us(device.call) == pytest.approx(10.0) and device.calls == 2
    assert clock.once_us(device.call) == pytest.approx(10.0) and device.calls == 3  # what was learned is kept


def test_a_call_that_the_host_is_never_ahead_of_includes_its_time(device: Device) -> None:
    device.host = 1e6
    assert GpuClock().once_us(device.call) > 9e5 and device.calls == 6  # 2, 4, ... 64 fills
