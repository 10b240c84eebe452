"""One projection over rows sorted by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastpeft_kernels.experts import ExpertAdapter, ExpertProjection, grouped_lora_linear
from fastpeft_kernels.experts.reference import grouped_lora_linear_reference
from fastpeft_kernels.weights import DenseWeight
from tests.budget import assert_within_budget
from tests.kernels.experts.mixtures import derive, parameters, projection, widened

pytestmark = pytest.mark.usefixtures("nan_filled")


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0]], ids=str)
def test_within_the_budget(counts: list[int], dtype: torch.dtype, backend: str) -> None:
    p, each = projection(4, 24, 16, 8, dtype=dtype, bias=True), torch.tensor(counts)
    x = torch.randn(sum(counts), 24).to(dtype).requires_grad_()
    dy = torch.randn(sum(counts), 16).to(dtype)
    ours = derive(lambda: grouped_lora_linear(x, each, p, backend=backend), [x, *parameters([p])], dy)
    same = derive(lambda: grouped_lora_linear_reference(x, each, p, dtype), [x, *parameters([p])], dy)
    p64, x64 = widened(p), x.detach().double().requires_grad_()
    exact = derive(lambda: grouped_lora_linear_reference(x64, each, p64, torch.float64), [x64, *parameters([p64])], dy)
    for i, (mine, theirs, truth) in enumerate(zip(ours, same, exact, strict=True)):
        assert mine is not None and theirs is not None and truth is not None
        assert_within_budget(mine, theirs, truth, name=str(i))


def test_gradients_in_fp64() -> None:
    p = projection(3, 5, 4, 2, 1, dtype=torch.float64, transposed=True)
    x, counts = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.tensor([2, 0, 4])
    every = (x, *parameters([p]))
    assert torch.autograd.gradcheck(lambda x, *_: grouped_lora_linear(x, counts, p), every)


def _bad(**changes: Any) -> Callable[[], Any]:
    def call() -> Any:
        given = {"x": torch.randn(3, 24), "counts": torch.tensor([1, 2]), "projection": projection(2, 24, 16, 4)}
        return grouped_lora_linear(**{**given, **changes})

    return call


def _with(**changes: Any) -> ExpertProjection:
    fields: dict[str, Any] = {"weight": DenseWeight(torch.ones(32, 24)), "experts": 2}
    return ExpertProjection(**{**fields, **changes})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (_bad(counts=torch.tensor([1, 1])), ValueError, "counts: expected numbers from 0 that add up to 3"),
        (_bad(counts=torch.tensor([4, -1])), ValueError, "counts: expected numbers from 0"),
        (_bad(counts=torch.tensor([3])), ValueError, r"counts: expected \(2,\) on cpu, got \(1,\)"),
        (_bad(counts=torch.tensor([1.0, 2.0])), TypeError, "counts: expected a dtype of"),
        (_bad(projection=None), TypeError, "projection: expected a ExpertProjection, got NoneType"),
        (_bad(projection=_with(experts=0)), ValueError, "projection.experts: expected an integer of at least 1, got 0"),
        (_bad(projection=_with(experts=5)), ValueError, "projection.weight: expected 5 matrices under each other"),
        (_bad(projection=_with(bias=torch.ones(2, 15))), ValueError, r"projection.bias: expected shape \(2, 16\)"),
        (_bad(projection=_with(bias=torch.ones(2, 16, requires_grad=True))), ValueError, "expected a frozen tensor"),
        (
            _bad(projection=_with(adapters=(ExpertAdapter(torch.ones(2, 3, 24), torch.ones(2, 16, 4)),))),
            ValueError,
            r"projection.adapters\[0\].b: expected shape \(2, 16, 3\), got \(2, 16, 4\)",
        ),
        (
            _bad(projection=_with(adapters=(ExpertAdapter(torch.ones(6, 24), torch.ones(2, 16, 3)),))),
            ValueError,
            r"adapters\[0\].a: expected \(2, rank >= 1, 24\), got \(6, 24\)",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
