"""Which launches are Triton's own, and which go to what it compiled for one before."""

from __future__ import annotations

import enum
import importlib
import itertools
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
import triton.language as tl
from triton import JITFunction, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

import fastpeft_kernels
from fastpeft_kernels.common import bounded
from fastpeft_kernels.common.launching import ALWAYS, Launcher

GPU = torch.device("cuda:0")
X = torch.empty(64)


def _kernel(x_ptr, y_ptr, rows, columns, scale, SIZE: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


class Driver:
    """Of a machine with GPUs of which nothing but their number is asked."""

    def __init__(self, backend: str) -> None:
        self.current, self.backend = 0, backend

    def get_current_device(self) -> int:
        return self.current

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32) if self.backend == "cuda" else GPUTarget("hip", "gfx942", 64)


class Compiled(CompiledKernel):  # type: ignore[misc]
    function = module = packed_metadata = None

    def __init__(self, launched: list[tuple[Any, ...]]) -> None:
        self.launched = launched

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        self.launched.append(("triton", self, args[:3], args[9:]))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: self.launched.append(("compiled", self, grid, args))


class Future:
    """What is still being compiled elsewhere: Triton launches it, nobody else can."""

    function = module = packed_metadata = None
    launch_metadata, run = Compiled.launch_metadata, Compiled.run

    def __init__(self, launched: list[tuple[Any, ...]]) -> None:
        self.launched = launched


class Machine:
    """Triton's own launches, which find out all that they do, but for compiling and the GPU."""

    def __init__(self, patched: pytest.MonkeyPatch, backend: str = "cuda", made: type = Compiled) -> None:
        self.launched, self.driver = list[tuple[Any, ...]](), Driver(backend)
        self.options = list[Any]()
        patched.setattr(driver, "_active", self.driver)
        self.kernel = JITFunction(_kernel, do_not_specialize=["columns"])

        def compiling(key: str, signature: Any, device: int, constants: Any, options: Any, *_: Any) -> Any:
            self.options.append(options)
            self.kernel.device_caches[device][0][key] = made(self.launched)
            return self.kernel.device_caches[device][0][key]

        patched.setattr(self.kernel, "_do_compile", compiling)
        self.launch = Launcher(self.kernel)

    def how(self) -> list[str]:
        return [how for how, *_ in self.launched]


GIVEN = {"x_ptr": X, "y_ptr": None, "rows": 7, "columns": 7, "scale": 0.5, "SIZE": 64, "KIND": "a", "num_warps": 4}


def test_what_is_as_before_goes_to_what_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    it, other = Machine(monkeypatch), torch.empty(64)
    it.launch(GPU, (3,), X, None, 7, 7, 0.5, SIZE=64, KIND="a", num_warps=4)
    it.launch(GPU, (5, 2), other, None, KIND="a", columns=7, rows=7, scale=0.75, num_warps=4, SIZE=64)
    (how, first, grid, args), (how_then, then, grid_then, args_then) = it.launched
    assert (how, grid, args) == ("triton", (3, 1, 1), (X, None, 7, 7, 0.5, 64, "a"))
    assert (how_then, grid_then, args_then[1:]) == ("compiled", (5, 2, 1), (None, 7, 7, 0.75, 64, "a"))
    assert then is first and args_then[0] is other


@pytest.mark.parametrize(
    "changed",
    [
        {"x_ptr": X.half()},
        {"y_ptr": X},
        {"x_ptr": None, "y_ptr": X},
        {"x_ptr": X[1:]},
        {"rows": 16},
        {"columns": 2**31},
        {"rows": 7.0},
        {"rows": True},
        {"SIZE": 32},
        {"num_warps": 8},
        {"maxnreg": None},
    ],
    ids=lambda changed: ", ".join(changed),
)
def test_what_is_not_is_triton_s_and_then_known_as_well(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    it = Machine(monkeypatch)
    for change in ({}, changed, {}, changed):
        it.launch(GPU, (1,), **{**GIVEN, **change})
    assert it.how() == ["triton", "triton", "compiled", "compiled"]


class Size(enum.IntEnum):
    ROWS = 7


@contextmanager
def setting(of: Any, name: str, value: Any):  # type: ignore[no-untyped-def]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(of, name, value)
        yield


@pytest.mark.parametrize(
    ("changed", "meanwhile"),
    [
        ({"rows": Size.ROWS}, nullcontext),
        ({"num_ctas": 1}, nullcontext),
        ({}, lambda: setting(knobs.runtime, "debug", True)),
        ({}, lambda: setting(knobs.compilation, "instrumentation_mode", "fpsan")),
        ({}, lambda: setting(knobs.runtime, "add_stages_inspection_hook", lambda: ("", ""))),
    ],
    ids=["type", "option", "debugged", "instrumented", "inspected"],
)
def test_what_is_not_known_is_triton_s_each_time(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], meanwhile: Callable[[], AbstractContextManager[Any]]
) -> None:
    it = Machine(monkeypatch)
    it.launch(GPU, (1,), **GIVEN)
    with meanwhile():
        for _ in range(2):
            it.launch(GPU, (1,), **{**GIVEN, **changed})
    it.launch(GPU, (1,), **GIVEN)
    assert it.how() == ["triton", "triton", "triton", "compiled"]


def test_hooks_before_a_launch_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    it, called = Machine(monkeypatch), []
    it.kernel.add_pre_run_hook(lambda *_, **__: called.append(1))
    for _ in range(2):
        it.launch(GPU, (1,), **GIVEN)
    assert (it.how(), called) == (["triton", "triton"], [1, 1])


def test_each_gpu_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current one, wherever the tensors are."""
    it = Machine(monkeypatch)

    @contextmanager
    def on(device: torch.device):  # type: ignore[no-untyped-def]
        it.driver.current, before = device.index, it.driver.current
        yield
        it.driver.current = before

    monkeypatch.setattr(torch.cuda, "device", on)
    for device in ("cuda:0", "cuda:1", "cuda", "cuda:1"):
        it.launch(torch.device(device), (1,), **GIVEN)
        assert it.driver.current == 0
    assert it.how() == ["triton", "triton", "compiled", "compiled"]
    (_, first, *_), (_, second, *_), (_, third, *_), (_, fourth, *_) = it.launched
    assert first is third is not second is fourth


@pytest.mark.parametrize(("backend", "made"), [("hip", Compiled), ("cuda", Future)], ids=["AMD", "in the background"])
def test_what_cannot_be_kept(monkeypatch: pytest.MonkeyPatch, backend: str, made: type) -> None:
    """On AMD's GPUs Triton also compiles for the size of a tensor's memory."""
    it = Machine(monkeypatch, backend, made)
    for _ in range(2):
        it.launch(GPU, (1,), **GIVEN)
    assert it.how() == ["triton", "triton"]


def test_a_product_and_a_sum_are_rounded_once_whatever_triton_does_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Machine(monkeypatch)
    monkeypatch.setattr(knobs.language, "default_fp_fusion", False)
    it.launch(GPU, (1,), **GIVEN)
    it.launch(GPU, (1,), **GIVEN, num_ctas=1)
    it.launch(GPU, (1,), **{**GIVEN, "rows": Size.ROWS})
    assert {options.enable_fp_fusion for options in it.options} == {True}
    assert it.how() == ["triton"] * 3


def test_interpreter_is_left_alone() -> None:
    class Interpreted:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **named: called.append((grid, args, named))

    called: list[Any] = []
    for _ in range(2):
        Launcher(Interpreted())(torch.device("cpu"), (2, 3), X, SIZE=4, num_warps=4)
    assert called == [((2, 3), (X,), {"SIZE": 4, "num_warps": 4})] * 2


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    it = Machine(monkeypatch)
    for rows in range(bounded.MOST + 50):
        it.launch(GPU, (1,), **{**GIVEN, "rows": rows})
    assert bounded.MOST - bounded._AT_ONCE < len(it.launch._compiled) <= bounded.MOST


def _described(block: int, dtype: torch.dtype) -> TensorDescriptor:
    return TensorDescriptor(torch.empty(16, 64, dtype=dtype), [16, 64], [64, 1], [block, 32])


TENSORS = [None, X, X[1:], X[4:], X.half(), X.half()[1:], X.half()[8:], X.bfloat16(), torch.nn.Parameter(X)]
TENSORS += [X.to(torch.int8), *(_described(block, kind) for block in (8, 16) for kind in (torch.half, torch.bfloat16))]
INTEGERS = [-16, -1, 0, 1, 2, 15, 16, 17, 32, 48, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63]
NUMBERS = [*INTEGERS, None, True, False, 0.0, -0.0, 1.0, 16.0, 0.5, float("nan"), float("inf"), 1e300]
CONSTANTS = [None, 0, 1, 1.0, True, False, 0.5, 16, "a", "b", torch.float16, tl.float16]
VALUES: dict[str, list[Any]] = {
    **dict.fromkeys(("x_ptr", "y_ptr"), TENSORS + INTEGERS),
    **dict.fromkeys(("rows", "columns", "scale"), NUMBERS),
    **dict.fromkeys(("SIZE", "KIND"), CONSTANTS),
    "num_warps": [4, 8],
    "num_stages": [1, 3],
}


def check_the_second(it: Machine, first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether it was taken for one like the first: if so, Triton finds by its own key the very kernel that ours did."""
    launch = Launcher(it.kernel)
    launch(GPU, (1,), **first)
    launch(GPU, (1,), **second)
    how, compiled, _, args = it.launched[-1]
    if how == "compiled":
        it.kernel[(1,)](**second, **ALWAYS)
        assert it.launched[-1][1] is compiled
        assert all(given is second[name] for given, name in zip(args, it.kernel.arg_names, strict=True))
    return bool(how == "compiled")


@pytest.mark.parametrize("name", VALUES)
def test_one_argument_is_taken_for_another_only_where_triton_does_so(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    it = Machine(monkeypatch)
    for before, after in itertools.product(VALUES[name], repeat=2):
        same = check_the_second(it, {**GIVEN, name: before}, {**GIVEN, name: after})
        assert same or before is not after


DRAWN = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in VALUES.items()})


@settings(max_examples=100)
@given(first=DRAWN, other=DRAWN, changed=st.lists(st.sampled_from(sorted(VALUES)), max_size=3))
def test_arguments_are_taken_for_others_only_where_triton_does_so(
    first: dict[str, Any], other: dict[str, Any], changed: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        same = check_the_second(Machine(patched), first, {**first, **{name: other[name] for name in changed}})
    assert same or changed


def test_constants_of_every_kernel_come_last() -> None:
    launchers = {}
    for found in pkgutil.walk_packages(fastpeft_kernels.__path__, "fastpeft_kernels."):
        if ".gpu" not in found.name:
            module = importlib.import_module(found.name)
            launchers |= {each: found.name for each in vars(module).values() if isinstance(each, Launcher)}
    kernels = [each.kernel for each in launchers if isinstance(each.kernel, JITFunction)]
    assert len(launchers) > 25
    for kernel in kernels:
        constants = [parameter.is_constexpr for parameter in kernel.params]
        assert constants == sorted(constants), kernel
        assert not any(parameter.annotation_type or parameter.has_default for parameter in kernel.params), kernel
