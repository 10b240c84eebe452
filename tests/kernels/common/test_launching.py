"""Which launches are Triton's own, and which go to what it compiled for one before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastpeft_kernels.common import bounded
from fastpeft_kernels.common.launching import Launcher

CPU = torch.device("cpu")


class Kernel:
    """Notes who was launched with what; `compiles` as on a GPU, where Triton returns what it compiled."""

    arg_names = ("x", "y", "rows", "EPS", "SIZE")

    def __init__(self, compiles: bool = True) -> None:
        self.compiles, self.launched = compiles, list[tuple[Any, ...]]()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **constants: Any) -> Any:
            self.launched.append(("triton", grid, args, constants))
            return Compiled(self) if self.compiles else None

        return launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: self.kernel.launched.append(("compiled", grid, args))


def tensor(dtype: torch.dtype = torch.float32, offset: int = 0) -> torch.Tensor:
    return torch.empty(32, dtype=dtype)[offset:]


def test_what_is_as_before_goes_to_what_was_compiled() -> None:
    kernel = Kernel()
    launch, x = Launcher(kernel), tensor()
    launch(CPU, (3,), (x, None), (7,), SIZE=64, EPS=0.5, num_warps=4)
    (first,) = kernel.launched
    assert first == ("triton", (3, 1, 1), (x, None, 7), {"SIZE": 64, "EPS": 0.5, "num_warps": 4})
    other = tensor()
    launch(CPU, (5, 2), (other, None), (7,), SIZE=64, EPS=0.5, num_warps=4)
    how, grid, args = kernel.launched[-1]
    assert (how, grid, args[0] is other, args[1:]) == ("compiled", (5, 2, 1), True, (None, 7, 0.5, 64))


@pytest.mark.parametrize(
    "changed",
    [
        {"tensors": (tensor(torch.float16), None)},
        {"tensors": (tensor(), tensor())},
        {"tensors": (None, tensor())},
        {"tensors": (tensor(offset=1), None)},
        {"numbers": (16,)},
        {"SIZE": 32},
        {"num_warps": 8},
        {"device": torch.device("meta")},
    ],
    ids=["a dtype", "one more", "another one", "off by an element", "number", "constant", "option", "device"],
)
def test_what_is_not_is_triton_s(changed: dict[str, Any]) -> None:
    kernel = Kernel()
    launch = Launcher(kernel)
    given = {"device": CPU, "grid": (1,), "tensors": (tensor(), None), "numbers": (7,), "EPS": 0.0, "SIZE": 64}
    given["num_warps"] = 4
    launch(**given)
    launch(**{**given, **changed})
    assert [how for how, *_ in kernel.launched] == ["triton", "triton"]


def test_tensors_off_by_some_bytes_are_never_taken_for_others() -> None:
    """Triton compiles loads of several elements for what lies at multiples of 16 bytes."""
    kernel = Kernel()
    launch = Launcher(kernel)
    for offset in (1, 1, 0, 1, 0):
        launch(CPU, (1,), (tensor(offset=offset), None), (7,), EPS=0.0, SIZE=64)
    assert [how for how, *_ in kernel.launched] == ["triton"] * 4 + ["compiled"]


def test_interpreter_compiles_nothing() -> None:
    kernel = Kernel(compiles=False)
    launch = Launcher(kernel)
    for _ in range(2):
        launch(CPU, (1,), (tensor(), None), (7,), EPS=0.0, SIZE=64)
    assert [how for how, *_ in kernel.launched] == ["triton", "triton"]


def test_what_is_kept_is_bounded() -> None:
    launch, x = Launcher(Kernel()), tensor()
    for rows in range(bounded.MOST + 50):
        launch(CPU, (1,), (x, None), (rows,), EPS=0.0, SIZE=64)
    assert len(launch._compiled) == bounded.MOST
