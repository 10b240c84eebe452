"""What is made in place of an operation that was called before with the same shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft.memory.trace.repeated import Repeated

aten = torch.ops.aten


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def described(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(described, result))
    return result if result is None else (result.shape, result.stride(), result.dtype, result.device)


NORM = (empty(3, 8), empty(3, 8), [8], empty(3, 1), empty(3, 1), empty(8), empty(8))
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.mm.default, (empty(3, 4), empty(4, 5))),
    (aten.add.Tensor, (empty(4, 3).t(), empty(3, 1, dtype=torch.bfloat16))),
    (aten.sum.dim_IntList, (empty(3, 4), [1], True)),
    (aten.cat.default, ([empty(3, 4), empty(3, 2)], 1)),
    (aten.native_layer_norm_backward.default, (*NORM, [True, False, True])),
]


@pytest.mark.parametrize(("func", "args"), CALLS, ids=lambda each: str(each) if callable(each) else "")
def test_the_same_comes_out_with_memory_of_its_own(func: Any, args: tuple[Any, ...]) -> None:
    repeated, wanted = Repeated(), described(func(*args))
    found = [repeated(func, args, {}) for _ in range(3)]
    assert [described(each) for each in found] == [wanted] * 3
    tensors = [part for each in found for part in (each if isinstance(each, tuple) else (each,)) if part is not None]
    assert len({part.untyped_storage()._cdata for part in tensors}) == len(tensors)


def test_it_is_not_called_again() -> None:
    repeated, calls = Repeated(), []

    def double(x: Tensor) -> Tensor:
        return x * 2

    def deduced(x: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.empty_like(x)

    torch.library.custom_op("fastpeft_tests::repeated", double, mutates_args=()).register_fake(deduced)
    op = torch.ops.fastpeft_tests.repeated.default
    for size in (3, 3, 4, 3):
        assert repeated(op, (empty(size),), {}).shape == (size,)
    assert calls == [3, 4]


def test_what_is_written_is_returned() -> None:
    repeated, x = Repeated(), empty(3, 5)
    for _ in range(2):
        assert repeated(aten.addmm_.default, (x, empty(3, 4), empty(4, 5)), {}) is x
        assert repeated(aten.mm.out, (empty(3, 4), empty(4, 5)), {"out": x}) is x
    for _ in range(2):
        grown = empty(0)
        assert repeated(aten.mm.out, (empty(3, 4), empty(4, 5)), {"out": grown}) is grown and grown.shape == (3, 5)


def test_parts_stay_parts() -> None:
    repeated, x = Repeated(), empty(6, 4)
    for func, args in (
        (aten.view.default, (x, [4, 6])),
        (aten.t.default, (x,)),
        (aten._unsafe_view.default, (x, [24])),
    ):
        for _ in range(2):
            assert repeated(func, args, {}).untyped_storage()._cdata == x.untyped_storage()._cdata


def test_numbers_of_different_types_are_different_arguments() -> None:
    repeated, x = Repeated(), empty(3, dtype=torch.int64)
    for _ in range(2):
        assert [repeated(aten.mul.Tensor, (x, by), {}).dtype for by in (1, 1.0, True)] == [
            torch.int64, torch.float32, torch.int64,
        ]  # fmt: skip


def test_tensors_with_values_are_computed() -> None:
    repeated, x = Repeated(), torch.ones(3)
    assert [repeated(aten.mul.Tensor, (x, 2), {}).sum().item() for _ in range(2)] == [6.0, 6.0]
    assert repeated(aten.mul.Tensor, (x + 1, 2), {}).sum().item() == 12.0
