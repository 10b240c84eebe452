"""Host memory that a driver pins, here one that only notes what it is asked."""

from __future__ import annotations

import pytest
import torch

from fastpeft.memory.streaming import host_store


class Driver:
    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, first: int, size: int, flags: int) -> int:
        if first in self.pinned:
            return 712
        self.pinned[first] = size
        return 0

    def cudaHostUnregister(self, first: int) -> int:
        del self.pinned[first]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(host_store, "_pins", True)
    return made


def test_whole_pages_are_pinned_once_and_given_back(driver: Driver) -> None:
    host = host_store.to_host(torch.arange(5000.0), host_store.Room())
    assert not host_store.is_pinned(host)
    host_store.pin(host)
    host_store.pin(host)  # as where a model is moved away and back
    assert host_store.is_pinned(host) and host_store._pins
    assert driver.pinned == {host.data_ptr(): 5 * host_store.PAGE} and host.data_ptr() % host_store.PAGE == 0
    first = host.data_ptr()
    del host
    assert not driver.pinned and first not in host_store._pinned


def test_a_driver_that_refuses_is_asked_no_more(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    hosts = [host_store.to_host(torch.zeros(4096), host_store.Room()) for _ in range(2)]
    driver.pinned[hosts[0].data_ptr()] = 0
    for host in hosts:
        host_store.pin(host)
    assert not any(map(host_store.is_pinned, hosts)) and len(caplog.records) == 1
    assert "CUDA error 712" in caplog.text
