"""The measured choice of what computes one large product: asked for, taken, left if it cannot serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.lora import Dtypes, lora_linear_group
from fastpeft_kernels.lora.configs import LINEAR_TMA, TINY, Config
from fastpeft_kernels.lora.keys import LINEAR, LinearKey
from fastpeft_kernels.tuning import choosing
from fastpeft_kernels.tuning.records import Winner
from tests.budget import assert_within_budget
from tests.kernels.lora.groups import check_group, projection

CPU = torch.device("cpu")
F16 = torch.float16
HALF = Dtypes(F16, F16, F16)
TILE = "triton 128x128x64 4w 3s tma g8"
FORWARD, DX = LinearKey(32, 24, 40, "float16", False), LinearKey(32, 40, 24, "float16", True)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch, groups_in_python: None) -> list[str]:
    """What computes the products, in order, a tile or "library", on a Hopper that Triton's interpreter plays."""
    pytest.importorskip("triton")
    from fastpeft_kernels.lora import forward, forward_tma, linear

    monkeypatch.setattr("fastpeft_kernels.lora.configs.device_capability", lambda device: 90)
    monkeypatch.setattr("fastpeft_kernels.lora.keys.kernels_serve", lambda device: True)
    monkeypatch.setattr("fastpeft_kernels.common.device._slow_on_cpu", lambda dtype: False)
    found: list[str] = []
    ours, described, library = forward.lora_linear, forward_tma.lora_linear_tma, linear.library_linear

    def product(*operands: Tensor | None, config: Config, **options: Any) -> Tensor:
        found.append(config.label)
        return ours(*operands, config=config, **options)

    def described_product(*operands: Any) -> Tensor:
        found.append(operands[-1].label)
        return described(*operands)

    def library_product(x: Tensor, w: Tensor, s: Tensor | None, *operands: Tensor | None, **options: Any) -> Tensor:
        if s is not None:  # else its own call for the update
            found.append("library")
        return library(x, w, s, *operands, **options)

    monkeypatch.setattr(forward, "lora_linear", product)
    monkeypatch.setattr(forward_tma, "lora_linear_tma", described_product)
    monkeypatch.setattr(linear, "library_linear", library_product)
    return found


def win(choice: str, *keys: LinearKey) -> None:
    for key in keys:
        choosing.learn(CPU, Winner(LINEAR, key._asdict(), choice, {choice: 1.0}))


@pytest.mark.interpreter
@pytest.mark.parametrize("backend", ("auto", "triton"))
@pytest.mark.parametrize("choice", ("torch", TILE))
def test_the_winner_computes_both_directions(choice: str, backend: str, taken: list[str]) -> None:
    """Unless it is the library, and our kernels were asked for."""
    win(choice, FORWARD, DX)
    group = [projection(24, 40, 8, dtype=F16, bias=True)]
    check_group(torch.randn(19, 24).to(F16).requires_grad_(), group, HALF, backend=backend)
    default = "library" if backend == "auto" else LINEAR_TMA[0].label
    expected = default if choice == "torch" else choice.removeprefix("triton ")
    assert taken == [expected] * 2


@pytest.mark.interpreter
def test_dx_of_siblings_is_one_product(taken: list[str]) -> None:
    win(TILE, FORWARD, DX)
    group = [projection(24, 40, 8, dtype=F16), projection(24, 40, 8, dtype=F16)]
    check_group(torch.randn(19, 24).to(F16).requires_grad_(), group, HALF)
    assert taken == [TILE.removeprefix("triton ")] * 3  # two forward, one for dX of both


@pytest.mark.interpreter
@pytest.mark.parametrize("backend, expected", [("auto", "library"), ("triton", TINY.label)])
def test_a_winner_that_cannot_serve_is_not_taken(backend: str, expected: str, taken: list[str]) -> None:
    win(TILE, FORWARD, DX)
    group = [projection(24, 40, 3, dtype=F16)]  # rows of S and B at multiples of 6 bytes
    check_group(torch.randn(19, 24).to(F16).requires_grad_(), group, HALF, backend=backend)
    assert taken == [expected] * 2


@pytest.mark.interpreter
def test_results_in_another_dtype(taken: list[str]) -> None:
    """For which the library is not asked to round twice, and a tile only where ours are asked for."""
    win(TILE, FORWARD)
    x, group = torch.randn(19, 24).to(F16), [projection(24, 40, 8, dtype=F16)]
    assert lora_linear_group(x, group, out_dtype=torch.float32)[0].dtype == torch.float32 and not taken
    assert lora_linear_group(x, group, out_dtype=torch.float32, backend="triton")[0].dtype == torch.float32
    assert taken == [TILE.removeprefix("triton ")]


def test_the_library_s_product_rounds_no_more_than_it_must() -> None:
    pytest.importorskip("triton")
    from fastpeft_kernels.lora.linear import library_linear

    shapes = ((9, 16), (12, 16), (9, 4), (12, 4), (12,), (9, 12))
    x, w, s, b, bias, before = (torch.randn(shape) for shape in shapes)
    exact = x.double() @ w.double().t() + s.double() @ b.double().t() + bias.double()
    with torch.no_grad():
        y = library_linear(x, w, s, b, bias, out=torch.full_like(before, torch.nan))
        assert_within_budget(y, x @ w.t() + s @ b.t() + bias, exact)
        y = library_linear(x, w, s, b, bias, out=before.clone(), accumulate=True)
        assert_within_budget(y, before + x @ w.t() + s @ b.t() + bias, before.double() + exact)
        y = library_linear(x, w, None, None, out=torch.full_like(before, torch.nan))
        assert_within_budget(y, x @ w.t(), x.double() @ w.double().t())
