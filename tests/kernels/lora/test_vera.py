"""VeRA's matrix against its formula, and VeRA's update as LoRA's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.lora import LoraAdapter, LoraProjection, lora_linear_group, vera_up
from fastpeft_kernels.weights import DenseWeight


def drawn(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    b, lambda_b, lambda_d = torch.randn(6, 3).to(dtype), torch.randn(6).to(dtype), torch.randn(3).to(dtype)
    return b, lambda_b.requires_grad_(), lambda_d.requires_grad_()


def test_gradcheck() -> None:
    b, *vectors = drawn()
    assert torch.autograd.gradcheck(lambda *given: vera_up(b, *given), vectors)


def test_the_formula_of_the_paper() -> None:
    b, lambda_b, lambda_d = drawn()
    x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    a, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    exact = x @ weight.t() + lambda_b * ((lambda_d * (x @ a.t())) @ b.t())
    projection = LoraProjection(DenseWeight(weight), None, (LoraAdapter(a, vera_up(b, lambda_b, lambda_d)),))
    (ours,) = lora_linear_group(x, (projection,))
    torch.testing.assert_close(ours, exact)
    dy = torch.randn_like(exact)
    found, wanted = (torch.autograd.grad(y, (x, lambda_b, lambda_d), dy) for y in (ours, exact))
    torch.testing.assert_close(found, wanted)


def test_dtypes() -> None:
    b, lambda_b, lambda_d = drawn(torch.float32)
    wide = vera_up(b.bfloat16(), lambda_b, lambda_d)
    assert wide.dtype == torch.float32
    wide.sum().backward()
    assert lambda_b.grad is not None and lambda_b.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"b": torch.zeros(6, 2)}, ValueError, r"b: expected shape \(6, 3\) of lambda_b and lambda_d, got \(6, 2\)"),
        ({"lambda_b": torch.zeros(6, 1)}, ValueError, r"lambda_b: expected 1 dimensions, got shape \(6, 1\)"),
        ({"lambda_d": torch.zeros(3).long()}, TypeError, "lambda_d: expected a floating tensor, got torch.int64"),
    ],
    ids=["b", "lambda_b", "lambda_d"],
)
def test_bad_input(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(zip(("b", "lambda_b", "lambda_d"), drawn(), strict=True))
    with pytest.raises(error, match=message):
        vera_up(**{**arguments, **changed})


@pytest.mark.parametrize("without", [None, 0, 2], ids=["all", "first", "last"])
def test_one_frozen_a_is_multiplied_once_for_all_that_share_it(without: int | None) -> None:
    """Siblings of VeRA, one of them frozen; an output that nobody reads."""
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    shared = torch.randn(3, 9, dtype=torch.float64)
    ups = [torch.randn(size, 3, dtype=torch.float64, requires_grad=True) for size in (6, 2, 6)]
    weights = [torch.randn(size, 4, dtype=torch.float64) for size in (6, 2, 6, 5)]
    projections = [
        LoraProjection(DenseWeight(weights[0]), None, (LoraAdapter(shared[:, :4], ups[0]),)),
        LoraProjection(DenseWeight(weights[3])),
        LoraProjection(DenseWeight(weights[1]), None, (LoraAdapter(shared[:, :4], ups[1], 0.5),)),
        LoraProjection(DenseWeight(weights[2]), None, (LoraAdapter(shared[:, :4], ups[2]),)),
    ]
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        q, frozen, k, v = lora_linear_group(x, projections)
    assert kept.count((7, 3)) == 1 and (7, 9) not in kept
    ours = [q, k, v, frozen]
    s = x @ shared[:, :4].t()
    exact = [x @ w.t() + f * (s @ b.t()) for w, b, f in zip(weights[:3], ups, (1.0, 0.5, 1.0), strict=True)]
    exact.append(x @ weights[3].t())
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs)
    dys = [torch.randn_like(y) for y in exact]
    read = [i for i in range(4) if i != without]
    found, wanted = (
        torch.autograd.grad([ys[i] for i in read], (x, *ups), [dys[i] for i in read], allow_unused=True)
        for ys in (ours, exact)
    )
    assert [g is None for g in found] == [g is None for g in wanted]
    torch.testing.assert_close([g for g in found if g is not None], [g for g in wanted if g is not None])


def test_a_that_is_trained_or_another_view_is_not_shared() -> None:
    x, shared = torch.randn(7, 4, requires_grad=True), torch.randn(3, 9)
    b = torch.randn(6, 3, requires_grad=True)
    for other in (shared[:, 1:5], shared[:, :4].clone(), shared[:, :4].clone().requires_grad_()):
        pairs = [(DenseWeight(torch.randn(6, 4)), a) for a in (shared[:, :4], other)]
        ours = lora_linear_group(x, [LoraProjection(w, None, (LoraAdapter(a, b),)) for w, a in pairs])
        exact = [x @ w.weight.t() + x @ a.t() @ b.t() for w, a in pairs]
        torch.testing.assert_close(list(ours), exact)
        found, wanted = (torch.autograd.grad(sum(y.sum() for y in ys), (x, b)) for ys in (ours, exact))
        torch.testing.assert_close(found, wanted)
