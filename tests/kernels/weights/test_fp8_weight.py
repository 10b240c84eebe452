"""A weight with products in e4m3: those of the definition; values, stamps and storage of what is under it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.fp8 import Fp8Rows, quantise_rows
from fastpeft_kernels.fp8.reference import scaled_product_reference
from fastpeft_kernels.lora import LoraAdapter, LoraProjection, lora_linear_group
from fastpeft_kernels.weights import DenseWeight, Fp8Weight, FrozenWeight, ScaledWeight, fp8, unflatten_weight
from tests.budget import assert_within_budget

ROWS, COLUMNS = 48, 64


def dense(dtype: torch.dtype) -> FrozenWeight:
    return DenseWeight(torch.randn(ROWS, COLUMNS).to(dtype))


def blocks(dtype: torch.dtype) -> FrozenWeight:
    codes = (torch.randn(ROWS, COLUMNS) * 50).to(torch.float8_e4m3fn)
    return ScaledWeight(codes, torch.rand(2, 2) + 0.5, block=(32, 32), dtype=dtype)


def products(x: Tensor, w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(by PyTorch in `dtype`, exact) products of x and w (n, k), rounded to e4m3 by rows."""
    a, b = quantise_rows(x), quantise_rows(w)
    plain = (a.codes.float() * a.scale).to(dtype) @ (b.codes.float() * b.scale).to(dtype).t()
    return plain, scaled_product_reference(*a, *b, torch.float64, wide=torch.float64)


@pytest.mark.parametrize("make", [dense, blocks])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_values(make: Any, dtype: torch.dtype) -> None:
    base = make(dtype)
    weight = Fp8Weight.of(base, backward=True)
    x, dy = torch.randn(5, COLUMNS).to(dtype), torch.randn(5, ROWS).to(dtype)
    values = base.decode(dtype=torch.float32)
    for ours, operand, w in ((weight.linear(x), x, values), (weight.linear_t(dy), dy, values.t())):
        assert ours is not None
        assert_within_budget(ours, *products(operand, w, dtype))
    assert torch.equal(weight.decode(dtype=torch.float32), values)
    assert Fp8Weight.of(base, backward=False).linear_t(dy) is None
    tensors, meta = weight.flatten()
    again = unflatten_weight(weight.kind, tensors, json.loads(json.dumps(meta)))
    assert torch.equal(again.linear(x), weight.linear(x)) and torch.equal(again.linear_t(dy), weight.linear_t(dy))


@pytest.mark.parametrize("backward", [False, True])
def test_a_group_with_adapters(backward: bool) -> None:
    """Frozen products in e4m3, those of the adapters as ever: the same as with autograd over plain PyTorch."""
    base = DenseWeight(torch.randn(ROWS, COLUMNS))
    a, b = torch.randn(4, COLUMNS, requires_grad=True), torch.randn(ROWS, 4, requires_grad=True)
    bias, x, dy = torch.randn(ROWS), torch.randn(2, 3, COLUMNS, requires_grad=True), torch.randn(2, 3, ROWS)
    weight = Fp8Weight.of(base, backward)
    (y,) = lora_linear_group(x, [LoraProjection(weight, bias, (LoraAdapter(a, b, 0.5),))])
    ours = (y, *torch.autograd.grad(y, (x, a, b), dy))

    def plain(dtype: torch.dtype) -> tuple[Tensor, ...]:
        rows, grads = x.detach().view(-1, COLUMNS), dy.view(-1, ROWS)
        leaves = [t.detach().to(dtype).requires_grad_() for t in (rows, a, b)]
        update = leaves[0] @ leaves[1].t() @ leaves[2].t() * 0.5
        which = 0 if dtype == torch.float32 else 1
        dx, da, db = torch.autograd.grad(update, leaves, grads.to(dtype))
        frozen = products(grads, base.weight.t(), torch.float32)[which]
        dx = dx + (frozen if backward else grads.to(dtype) @ base.weight.to(dtype))
        y = products(rows, base.weight, torch.float32)[which] + bias.to(dtype) + update.detach()
        return y.view(2, 3, ROWS), dx.view(2, 3, COLUMNS), da, db

    for name, mine, same, exact in zip(
        ("y", "dx", "da", "db"), ours, plain(torch.float32), plain(torch.float64), strict=True
    ):
        assert_within_budget(mine, same, exact, name)


def test_projections_of_one_input_bring_it_to_fp8_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [Fp8Weight.of(dense(torch.float32), backward=False) for _ in range(3)]
    x, made = torch.randn(5, COLUMNS), []

    def counted(x: Tensor) -> Fp8Rows:
        made.append(tuple(x.shape))
        return quantise_rows(x)

    alone = [weight.linear(x) for weight in weights]
    monkeypatch.setattr(fp8, "quantise_rows", counted)
    together = lora_linear_group(x, [LoraProjection(weight) for weight in weights])
    assert made == [(5, COLUMNS)]
    assert all(torch.equal(y, wanted) for y, wanted in zip(together, alone, strict=True) if wanted is not None)


def test_a_write_to_the_weight_is_noticed() -> None:
    base = DenseWeight(torch.randn(ROWS, COLUMNS))
    weight = Fp8Weight.of(base, backward=True)
    stamp = weight.stamp()
    weight.check_unchanged(stamp)
    base.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="frozen base weight"):
        weight.check_unchanged(stamp)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"base: .* 48 x 60 features"):
        Fp8Weight.of(DenseWeight(torch.randn(48, 60)), backward=False)
    with pytest.raises(ValueError, match="rows: expected codes of shape"):
        Fp8Weight(DenseWeight(torch.randn(48, 64)), quantise_rows(torch.randn(64, 48)))
