"""Rows in e4m3 and their product: against the definition in fp64, and the library's own product."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastpeft_kernels.fp8 import Fp8Rows, api, fp8_refusal, quantise_rows, scaled_product
from fastpeft_kernels.fp8.reference import LEAST, scaled_product_reference
from tests.budget import assert_within_budget

STEP = 2.0**-4  # half a unit in the last of 4 significant bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_each_row_is_rounded_once_to_four_significant_bits(dtype: torch.dtype) -> None:
    x = (torch.randn(7, 33) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    rows = quantise_rows(x)
    assert rows.codes.dtype == torch.float8_e4m3fn and rows.scale.shape == (7, 1)
    decoded, exact = rows.codes.double() * rows.scale.double(), x.double()
    largest = exact.abs().amax(1, keepdim=True)
    torch.testing.assert_close(rows.scale.double(), largest / 448, rtol=1e-6, atol=0.0)
    assert (rows.codes.double().abs().amax(1) == 448).all(), "the whole range is used"
    least_normal = largest / 448 * 2.0**-6
    error = (decoded - exact).abs()
    assert (error <= STEP * exact.abs().maximum(least_normal) * (1 + 1e-6)).all()


def test_rows_without_finite_or_usual_values() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-30, -2e-30], [1e33, 1.0], [torch.inf, 1.0], [1.0, torch.nan], [1e-39, 0.0]])
    rows = quantise_rows(x)
    assert rows.scale[[0, 5]].tolist() == [[LEAST / 448]] * 2
    assert rows.codes[0].float().tolist() == [0.0, 0.0]
    assert rows.codes[1].float().tolist() == [224.0, -448.0]
    assert rows.codes[2].float().tolist() == [448.0, 0.0]
    w = quantise_rows(torch.ones(16, 16))
    wide = Fp8Rows(torch.nn.functional.pad(rows.codes.float(), (0, 14)).to(torch.float8_e4m3fn), rows.scale)
    y = scaled_product(wide, w, torch.float32)
    assert y[[3, 4]].isnan().all() and y[[0, 1, 2, 5]].isfinite().all()


def test_any_strides_sizes_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(11, 40)
    whole = quantise_rows(x)
    monkeypatch.setattr(api, "_PIECE", 80)
    for other in (quantise_rows(x), quantise_rows(x.t().contiguous().t())):
        assert torch.equal(other.scale, whole.scale)
        assert torch.equal(other.codes.view(torch.uint8), whole.codes.view(torch.uint8))
    assert quantise_rows(x[:0]).codes.shape == (0, 40) and quantise_rows(x[:, :0]).scale.shape == (11, 1)


def operands(tokens: int = 5) -> tuple[Fp8Rows, Fp8Rows]:
    return quantise_rows(torch.randn(tokens, 64)), quantise_rows(torch.randn(48, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_decoded_codes(dtype: torch.dtype) -> None:
    x, w = operands()
    exact = scaled_product_reference(*x, *w, torch.float64, wide=torch.float64)
    plain = ((x.codes.float() * x.scale) @ (w.codes.float() * w.scale).t()).to(dtype)
    assert_within_budget(scaled_product(x, w, dtype), plain, exact)
    assert scaled_product(operands(1)[0], w, dtype).shape == (1, 48)
    assert scaled_product(operands(0)[0], w, dtype).shape == (0, 48)


def test_the_library_s_product_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has it on CPUs too, where ours does not ask for it."""
    x, w = operands()
    exact = scaled_product_reference(*x, *w, torch.float64, wide=torch.float64)
    plain = scaled_product(x, w, torch.bfloat16)
    monkeypatch.setattr(api, "fp8_refusal", lambda device: None)
    try:
        library = scaled_product(x, w, torch.bfloat16)
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"this torch has no product of rows in e4m3 on CPUs: {error}")
    assert_within_budget(library, plain, exact)


def test_who_has_such_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    for capability, found in ((80, "cuda:0 of 8.0"), (None, "cuda:0"), (89, None), (120, None)):
        monkeypatch.setattr(api, "device_capability", lambda device, capability=capability: capability)
        assert fp8_refusal(gpu) == found


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantise_rows(torch.ones(3)), ValueError, "x: expected"),
        (lambda: quantise_rows(torch.ones(3, 4).int()), TypeError, "x: expected"),
        (lambda: quantise_rows(torch.ones(3, 4), "cuda"), ValueError, "backend: expected one of"),
        (lambda: scaled_product(operands()[0], quantise_rows(torch.ones(16, 32)), torch.float32), ValueError, "x: exp"),
        (
            lambda: scaled_product(*[quantise_rows(torch.ones(16, 24))] * 2, torch.float32),
            ValueError,
            "w: expected multiples of 16, got 16 x 24",
        ),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
