from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastpeft_kernels.common import device


@pytest.fixture(autouse=True)
def forget() -> None:
    device._capability.cache_clear()
    device._version_of.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], ptxas: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(device, "ptxas_path", lambda _: ptxas)


def write_ptxas(folder: Path, version: str) -> str:
    path = folder / "ptxas"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.80'\n")
    path.chmod(0o755)
    return str(path)


def test_devices_without_a_capability() -> None:
    assert device.device_capability("cpu") is None
    assert device.device_capability(torch.device("meta")) is None
    assert device.hopper_dots_safe("cpu") is None


def test_capability_is_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (12, 0), None)
    assert device.device_capability("cuda") == device.device_capability("cuda:0") == 120


@pytest.mark.parametrize("version", ["12.8", "13.1", "13.2"])
def test_old_assemblers_are_refused_on_hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    pretend(monkeypatch, (9, 0), write_ptxas(tmp_path, version))
    assert f"Triton uses ptxas {version}" in str(device.hopper_dots_safe("cuda"))


@pytest.mark.parametrize("version", ["13.3", "13.10", "14.0"])
def test_new_assemblers_are_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    pretend(monkeypatch, (9, 0), write_ptxas(tmp_path, version))
    assert device.hopper_dots_safe("cuda") is None


@pytest.mark.parametrize("path", [None, "/nowhere/ptxas"])
def test_without_an_assembler_hopper_is_refused(monkeypatch: pytest.MonkeyPatch, path: str | None) -> None:
    pretend(monkeypatch, (9, 0), path)
    assert "no ptxas was found" in str(device.hopper_dots_safe("cuda"))


def test_other_architectures_are_not_affected(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (8, 0), None)
    assert device.hopper_dots_safe("cuda") is None


def test_the_installed_assembler_has_a_version() -> None:
    if not device.triton_available():
        pytest.skip("needs Triton")
    for capability in (80, 90, 120):
        version = device.ptxas_version(capability)
        assert version is not None and version >= (12, 0)


def test_a_gpu_that_triton_cannot_serve_is_left_to_pytorch_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trial = pytest.importorskip("fastpeft_kernels.common.triton_trial")

    def no_compiler(index: int) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(torch.cuda, "device", no_compiler)
    device._triton_launches.cache_clear()
    try:
        assert not any(device.triton_serves(torch.device("cuda", 3)) for _ in range(2))
    finally:
        device._triton_launches.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "Triton compiles no kernel on cuda:3, PyTorch serves instead: Please specify one"
    ]
    assert not device.triton_serves(torch.device("cpu")) and trial.logger.name == "fastpeft"


def test_a_triton_of_which_a_kernel_cannot_be_launched_again_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trial = pytest.importorskip("fastpeft_kernels.common.triton_trial")
    from fastpeft_kernels.common import launching

    launches = []

    def launch(self: object, where: torch.device, grid: tuple[int, ...], *args: object, **named: object) -> None:
        launches.append(where)
        if len(launches) == 2:
            raise TypeError("runner() takes other arguments")

    monkeypatch.setattr(launching.Launcher, "__call__", launch)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    with FakeTensorMode():
        assert not trial.launches(0)
    assert launches == [torch.device("cuda", 0)] * 2
    assert "PyTorch serves instead: runner() takes other arguments" in caplog.text
