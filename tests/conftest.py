"""What every test shares: options, seeds, threads, and memory that is never zero by luck."""

from __future__ import annotations

import functools
import gc
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import typer.main
from hypothesis import settings
from torch.utils._device import _device_constructors

if TYPE_CHECKING:
    from tests.checkpoints import Checkpoints

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

settings.register_profile("fastpeft", deadline=None, derandomize=True)
settings.load_profile("fastpeft")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all tests are collected
    torch.set_num_threads(1)
    cache = tempfile.TemporaryDirectory()  # `datasets` keeps a copy of all that it reads
    config.add_cleanup(cache.cleanup)
    os.environ["HF_DATASETS_CACHE"] = cache.name
    folder = config.getoption("--real-models")
    if folder is not None and not folder.is_dir():
        raise pytest.UsageError(f"--real-models: expected an existing folder, got {str(folder)!r}")


def pytest_collection_finish() -> None:
    """Leaves the modules and tests, millions of objects, out of every later search for garbage."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Triton decides when a kernel is decorated, so one process cannot hold both kinds of test.
    if item.get_closest_marker("interpreter") and not INTERPRETED:
        pytest.skip("needs a process with TRITON_INTERPRET=1")
    if item.get_closest_marker("aot") and INTERPRETED:
        pytest.skip("needs a process without TRITON_INTERPRET")


@pytest.fixture(autouse=True)
def imports_set_aside() -> Iterator[None]:
    """What a test imported is left out of later searches too: each short training run makes several."""
    before = len(sys.modules)
    yield
    if len(sys.modules) != before:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_parser() -> Iterator[None]:
    """The command line is read into its parser once, not for each of the hundreds of commands that are run here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture
def groups_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small groups of projections are computed by Python too, where a test replaces its functions or counts them."""
    from fastpeft_kernels.lora import direct

    monkeypatch.setattr(direct, "_if_there", lambda found: None)


@pytest.fixture
def real_models(request: pytest.FixtureRequest) -> Path:
    """The folder given by --real-models; the test is skipped without it."""
    folder: Path | None = request.config.getoption("--real-models")
    if folder is None:
        pytest.skip("needs --real-models DIR")
    return folder.resolve()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Tiny models on disk, each made when it is first asked for."""
    from tests.checkpoints import Checkpoints

    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch's generators for each test: by its name, the same in every run, or by --seed.

    A budget of twice another computation's error is met by all but about one draw in a thousand, so fresh numbers in
    every run would fail now and then for nothing; --seed tries others.
    """
    given: int | None = request.config.getoption("--seed")
    value = zlib.crc32(request.node.nodeid.encode()) if given is None else given
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_available():  # without, torch would keep a call, and where it came from, for when there is one
        torch.cuda.manual_seed_all(value)
    print(f"seed: {value}")
    return value


@pytest.fixture(scope="session")
def choices_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("choices")


@pytest.fixture(autouse=True)
def measured_choices(choices_root: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the user's cache folder, whose measured choices no test may depend on: a new one, not made yet."""
    from fastpeft_kernels.tuning import choosing, files

    folder = choices_root / f"{zlib.crc32(request.node.nodeid.encode()):08x}"
    monkeypatch.setattr(files, "user_folder", lambda: folder)
    monkeypatch.setattr(files, "SHIPPED", folder.with_suffix(".shipped"))
    choosing.forget()
    return folder


@pytest.fixture(autouse=True)
def packed_weights(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of the user's cache folder: one of the whole run, not made yet."""
    from fastpeft.memory.packed import entries as packed_entries

    folder = tmp_path_factory.getbasetemp() / "packed"
    monkeypatch.setattr(packed_entries, "user_folder", lambda: folder)
    return folder


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory comes filled with NaN, and with the largest value where it holds integers.

    For a whole file: `pytestmark = pytest.mark.usefixtures("nan_filled")`.
    """
    _device_constructors()  # torch asks once which functions `with torch.device(...)` is for: not for these
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _filling(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _filling(getattr(torch.Tensor, name)))
    yield


def _filling(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if torch.compiler.is_compiling() or tensor.device.type == "meta":
            return tensor
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            elif tensor.dtype is torch.bool:
                tensor.fill_(True)
            else:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return filled
