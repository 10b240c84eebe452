"""Checks that need a GPU of compute capability 8.9: rows in e4m3 bit for bit, products within what rounding allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..common.device import holds_huge_tensors, triton_available
from ..common.gpu_verdicts import Verdicts
from ..weights import DenseWeight, Fp8Weight, ScaledWeight
from .api import Fp8Rows, fp8_refusal, quantise_rows, scaled_product
from .reference import scaled_product_reference

_DEVICE = torch.device("cuda")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Several tiles of a row, the last in part; whole ones; odd; narrow; one.
_ROWS = ((33, 14336), (64, 4096), (5, 333), (1000, 7), (1, 1))
# tokens, in_features, out_features: odd numbers of tokens, one, and whole tiles; features from the least on.
_PRODUCTS = ((1, 4096, 4096), (37, 1024, 4112), (127, 4112, 1024), (8, 16, 16), (513, 14336, 4096), (4096, 512, 512))
_MANY = 2**31


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError; none where the GPU has no products in e4m3."""
    if fp8_refusal(torch.device("cuda", torch.cuda.current_device())) is not None:
        return
    if triton_available():
        yield "rows by our kernel and by PyTorch", _check_rows
        yield "rows of zeros, infinities, NaN, huge and tiny values", _check_special
    yield "products and the emulation", _check_products
    yield "products, fast sums", _check_fast_sums
    yield "no tokens, and rows that are not finite, through a product", _check_products_of_special
    yield "a weight, forward and backward", _check_weight
    yield "values with scales that are powers of two", _check_powers_of_two
    if triton_available() and holds_huge_tensors():
        yield "more than 2**31 elements", _check_many


def _check_rows() -> dict[str, Any]:
    """The same bits: both multiply by the same reciprocal and round once."""
    verdicts = Verdicts()
    for shape, dtype in product(_ROWS, _DTYPES):
        factors = torch.logspace(-6, 4, shape[0], device=_DEVICE)[:, None]
        wider = torch.full((shape[0], shape[1] + 3), torch.nan, device=_DEVICE, dtype=dtype)
        x = wider[:, : shape[1]]
        x.copy_(torch.randn(shape, device=_DEVICE) * factors)
        ours, again, plain = (quantise_rows(x, backend) for backend in ("triton", "triton", "torch"))
        _equal(verdicts, ours, again, f"{shape} {dtype}: not the same twice")
        _equal(verdicts, ours, plain, f"{shape} {dtype}: by our kernel and by PyTorch")
        turned = quantise_rows(x.t(), "triton")
        _equal(verdicts, turned, quantise_rows(x.t(), "torch"), f"{shape} {dtype}: turned")
    verdicts.settle()
    return {}


def _check_special() -> dict[str, Any]:
    inf, nan = torch.inf, torch.nan
    values = [
        [0.0, -0.0],
        [inf, 1.0],
        [-inf, 0.0],
        [nan, 1.0],
        [nan, nan],
        [3e38, -1.0],
        [1e-38, 1e-39],
        [448.0, 464.0],
    ]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor(values, device=_DEVICE, dtype=dtype)
        ours, plain = quantise_rows(x, "triton"), quantise_rows(x, "torch")
        odd = ~x.isfinite().all(1)
        assert torch.equal(ours.codes.float().isnan().any(1), odd), f"rows with a NaN among the codes, {dtype}"
        assert torch.equal(plain.codes.float().isnan().any(1), odd), f"rows with a NaN, by PyTorch, {dtype}"
        assert torch.equal(ours.codes[~odd].float(), plain.codes[~odd].float()), f"codes of finite rows, {dtype}"
        assert torch.equal(ours.scale[~odd], plain.scale[~odd]), f"scales of finite rows, {dtype}"
    return {}


def _check_products() -> dict[str, Any]:
    """Within what a sum in fp32 and one rounding to bf16 may err."""
    return {"largest_share_of_budget": _hold_products(fast_accum=False)}


def _check_fast_sums() -> dict[str, Any]:
    """Not used; how far they are off says whether they could be."""
    figures = {}
    for tokens, in_features, out_features in _PRODUCTS:
        x, w = _operands(tokens, in_features, out_features)
        fast, slow = (scaled_product(x, w, torch.bfloat16, fast_accum=fast).double() for fast in (True, False))
        exact = scaled_product_reference(*x, *w, torch.float64, wide=torch.float64)
        for name, y in (("fast", fast), ("slow", slow)):
            figures[f"{name} {tokens}x{in_features}x{out_features}"] = ((y - exact).norm() / exact.norm()).item()
    return figures


def _hold_products(fast_accum: bool) -> float:
    verdicts = Verdicts()
    for tokens, in_features, out_features in _PRODUCTS:
        x, w = _operands(tokens, in_features, out_features)
        ours = scaled_product(x, w, torch.bfloat16, fast_accum=fast_accum)
        emulated = scaled_product_reference(*x, *w, torch.bfloat16)
        exact = scaled_product_reference(*x, *w, torch.float64, wide=torch.float64)
        what = f"{tokens} tokens, {in_features} to {out_features}"
        verdicts.within(ours, emulated, exact, what)
        verdicts.equal(scaled_product(x, w, torch.bfloat16, fast_accum=fast_accum), ours, f"{what}: not the same twice")
    return verdicts.settle()


def _check_products_of_special() -> dict[str, Any]:
    weight = Fp8Weight.of(DenseWeight(torch.randn((64, 32), device=_DEVICE, dtype=torch.bfloat16)), backward=True)
    x = torch.randn((7, 32), device=_DEVICE, dtype=torch.bfloat16)
    x[1, 3], x[2, 0], x[3], x[4] = torch.nan, torch.inf, 0.0, 1e30
    y = weight.linear(x)
    assert y is not None and y[[1, 2]].isnan().all(), "rows with NaN or an infinity"
    assert y[[0, 3, 4, 5, 6]].isfinite().all() and not y[3].any(), "finite rows beside them, and zeros"
    for rows, features, call in ((0, 32, weight.linear), (0, 64, weight.linear_t)):
        nothing = call(torch.empty((rows, features), device=_DEVICE, dtype=torch.bfloat16))
        assert nothing is not None and nothing.shape == (0, 96 - features), "no tokens"
    return {}


def _check_weight() -> dict[str, Any]:
    """Through a LoRA group, over a 16-bit and a blockwise base; the frozen products as the emulation has them."""
    from ..lora import LoraAdapter, LoraProjection, lora_linear_group

    figures = {}
    for name, tokens, dtype in product(("dense", "blocks"), (129, 1), (torch.bfloat16, torch.float16)):
        base = _base(name, dtype)
        out_features, in_features = base.shape
        weight = Fp8Weight.of(base, backward=True)
        x = torch.randn((tokens, in_features), device=_DEVICE, dtype=dtype, requires_grad=True)
        a = torch.randn((8, in_features), device=_DEVICE, dtype=dtype, requires_grad=True)
        b = torch.zeros((out_features, 8), device=_DEVICE, dtype=dtype, requires_grad=True)
        dy = torch.randn((tokens, out_features), device=_DEVICE, dtype=dtype)
        (y,) = lora_linear_group(x, [LoraProjection(weight, None, (LoraAdapter(a, b),))])
        dx, _, db = torch.autograd.grad(y, (x, a, b), dy)
        assert db.isfinite().all()
        verdicts = Verdicts()
        for what, ours, operand, rows in (("y", y, x, weight.rows), ("dx", dx, dy, weight.columns)):
            assert rows is not None
            codes = quantise_rows(operand.detach(), "torch")
            # One rounding more than the product's own: of the library's bf16 to fp16, and where dx takes the update.
            plain = scaled_product_reference(*codes, *rows, torch.bfloat16).to(dtype)
            exact = scaled_product_reference(*codes, *rows, torch.float64, wide=torch.float64)
            verdicts.within(ours, plain, exact, f"{what} over {name}, {tokens} tokens, {dtype}")
            true = operand.detach().double() @ (
                base.decode(dtype=torch.float64) if what == "dx" else base.decode(dtype=torch.float64).t()
            )
            figures[f"{what} {name} {tokens} {dtype}"] = ((ours.double() - true).norm() / true.norm()).item()
        verdicts.settle()
    assert max(figures.values()) < 0.1, f"errors of e4m3 are some 4 percent of the norm: {figures}"
    return figures


def _check_powers_of_two() -> dict[str, Any]:
    codes = torch.randn((256, 128), device=_DEVICE).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.125], [4.0]], device=_DEVICE)
    for dtype in _DTYPES:
        of_bytes = ScaledWeight(codes, scale.to(torch.float8_e8m0fnu), block=(128, 128), dtype=dtype).decode()
        assert torch.equal(of_bytes, ScaledWeight(codes, scale, block=(128, 128), dtype=dtype).decode()), dtype
    return {}


def _check_many() -> dict[str, Any]:
    columns = 4112
    rows = _MANY // columns + 40
    x = torch.randn((rows, columns), device=_DEVICE, dtype=torch.bfloat16)
    ours = quantise_rows(x, "triton")
    verdicts = Verdicts()
    for part in (slice(0, 32), slice(_MANY // columns - 16, _MANY // columns + 16), slice(rows - 5, rows)):
        mine = Fp8Rows(ours.codes[part], ours.scale[part])
        _equal(verdicts, mine, quantise_rows(x[part], "torch"), f"rows {part}")
    verdicts.settle()
    return {"elements": rows * columns}


def _equal(verdicts: Verdicts, ours: Fp8Rows, wanted: Fp8Rows, what: str) -> None:
    verdicts.equal(ours.scale, wanted.scale, f"{what}, scales")
    verdicts.equal(ours.codes.view(torch.uint8), wanted.codes.view(torch.uint8), f"{what}, codes")


def _operands(tokens: int, in_features: int, out_features: int) -> tuple[Fp8Rows, Fp8Rows]:
    x, w = (torch.randn((n, in_features), device=_DEVICE, dtype=torch.bfloat16) for n in (tokens, out_features))
    return quantise_rows(x), quantise_rows(w)


def _base(name: str, dtype: torch.dtype) -> DenseWeight | ScaledWeight:
    w: Tensor = torch.randn((1040, 512), device=_DEVICE)
    if name == "dense":
        return DenseWeight(w.to(dtype))
    scale = torch.rand((9, 4), device=_DEVICE) * 1e-2
    return ScaledWeight((w * 50).to(torch.float8_e4m3fn), scale, block=(128, 128), dtype=dtype)
