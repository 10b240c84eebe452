"""The measured choice of what computes one large product of our own path: asked for, taken, left if it cannot serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels import tuner
from fastpeft_kernels.lora import Dtypes, lora_linear_group
from fastpeft_kernels.lora.keys import GROUP, LINEAR, GroupKey, LinearKey, linear_cases
from fastpeft_kernels.tuning import choosing
from fastpeft_kernels.tuning.records import Winner
from tests.budget import assert_within_budget
from tests.kernels.lora.groups import check_group, projection

CPU = torch.device("cpu")
F16 = torch.float16
HALF = Dtypes(F16, F16, F16)
QKV = GroupKey(64, 64, (64, 16, 16), (8, 8, 0), ("four_bit",) * 3, *("bfloat16",) * 3, False)
TILE = "triton 256x128x64 8w 4s tma g8 persistent"


def test_a_group_is_measured_with_the_products_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, before the group, in both directions; k and v are too small beside q."""
    for tunable in (one for one in tuner.tunables() if one.op in (GROUP, LINEAR)):
        assert len(tunable.candidates(CPU)) == 1
    monkeypatch.setattr("fastpeft_kernels.lora.keys.triton_serves", lambda device: True)
    gate_up = QKV._replace(out_features=(256, 256), ranks=(8, 8), bases=("bfloat16",) * 2)
    cases = [(one.op, key) for one, key in tuner.cases_for([(GROUP, QKV), (GROUP, gate_up)], CPU, [100])]
    products = [(64, 64, False), (64, 64, True), (64, 256, False), (256, 64, True)]
    assert cases == [
        *((LINEAR, LinearKey(128, n, m, "bfloat16", turned)) for n, m, turned in products),
        *((GROUP, key.at(100, CPU)) for key in (QKV, gate_up)),
    ]


@pytest.mark.parametrize("compute, lora", [("float32", "float32"), ("bfloat16", "float32")])
def test_there_is_no_choice_but_in_one_16_bit_dtype(compute: str, lora: str) -> None:
    assert linear_cases(QKV._replace(compute=compute, lora=lora)) == []


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What computes the products, in order, on a Hopper that Triton's interpreter plays."""
    pytest.importorskip("triton")
    from fastpeft_kernels.lora import linear

    monkeypatch.setattr("fastpeft_kernels.lora.configs.device_capability", lambda device: 90)
    monkeypatch.setattr("fastpeft_kernels.lora.keys.triton_serves", lambda device: True)
    found: list[str] = []
    ours, library = linear.lora_linear, linear.library_linear

    def product(*operands: Tensor | None, config: Any = None, **options: Any) -> Tensor:
        found.append("default" if config is None else config.label)
        return ours(*operands, config=config, **options)

    def library_product(*operands: Tensor | None, **options: Any) -> Tensor:
        found.append("library")
        return library(*operands, **options)

    monkeypatch.setattr(linear, "lora_linear", product)
    monkeypatch.setattr(linear, "library_linear", library_product)
    return found


def win(choice: str, *keys: LinearKey) -> None:
    for key in keys:
        choosing.learn(CPU, Winner(LINEAR, key._asdict(), choice, {choice: 1.0}))


@pytest.mark.interpreter
@pytest.mark.parametrize("choice", ("torch", TILE))
def test_the_winner_computes_both_directions(choice: str, taken: list[str]) -> None:
    win(choice, LinearKey(32, 24, 40, "float16", False), LinearKey(32, 40, 24, "float16", True))
    group = [projection(24, 40, 8, dtype=F16, bias=True), projection(24, 40, 8, dtype=F16)]
    check_group(torch.randn(19, 24).to(F16).requires_grad_(), group, HALF, backend="triton")
    assert taken == ["library" if choice == "torch" else choice.removeprefix("triton ")] * 4


@pytest.mark.interpreter
def test_a_winner_that_cannot_serve_is_not_taken(taken: list[str]) -> None:
    win(TILE, LinearKey(32, 24, 40, "float16", False), LinearKey(32, 40, 24, "float16", True))
    group = [projection(24, 40, 3, dtype=F16)]  # rows of S and B at multiples of 6 bytes
    check_group(torch.randn(19, 24).to(F16).requires_grad_(), group, HALF, backend="triton")
    assert taken == ["default"] * 2
    taken.clear()
    win("torch", LinearKey(32, 24, 40, "float16", False))
    x = torch.randn(19, 24).to(F16)
    assert lora_linear_group(x, group, out_dtype=torch.float32, backend="triton")[0].dtype == torch.float32
    assert taken == ["default"]


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
