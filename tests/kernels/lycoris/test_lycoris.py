"""LoHa and LoKr over a frozen projection, against PyTorch in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.lycoris import LohaAdapter, LokrAdapter, api, loha_linear, lokr_linear
from fastpeft_kernels.lycoris.reference import lycoris_linear_reference
from tests.budget import assert_within_budget
from tests.kernels.allocations import largest

OUT, IN = 12, 20


def loha(rank: int = 3, dtype: torch.dtype = torch.float32) -> LohaAdapter:
    shapes = ((OUT, rank), (rank, IN), (OUT, rank), (rank, IN))
    return LohaAdapter(*[torch.randn(shape).to(dtype).requires_grad_() for shape in shapes], 0.7)


def lokr(m: int = 4, dtype: torch.dtype = torch.float32) -> LokrAdapter:
    shapes = ((3, m), (OUT // 3, IN // m))
    return LokrAdapter(*[torch.randn(shape).to(dtype).requires_grad_() for shape in shapes], 1.3)


OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "loha": (loha_linear, loha),
    "lokr": (lokr_linear, lokr),
}
every_op = pytest.mark.parametrize("kind", OPS)


def leaves(x: Tensor, bias: Tensor | None, adapters: list[Any]) -> list[Tensor]:
    return [x, *([] if bias is None else [bias]), *[factor for adapter in adapters for factor in adapter.factors]]


@every_op
@pytest.mark.parametrize("shape", [(2, 3), (5,), (1, 1), (0, 4), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("sizes", [(2,), (4, 1, 2)], ids=["one", "three"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_same_as_the_definition(kind: str, shape: tuple[int, ...], sizes: tuple[int, ...], with_bias: bool) -> None:
    op, make = OPS[kind]
    x = torch.randn(*shape, IN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    bias = torch.randn(OUT, dtype=torch.float64, requires_grad=True) if with_bias else None
    adapters = [make(size, torch.float64) for size in sizes]
    ours, exact = op(x, weight, adapters, bias=bias), lycoris_linear_reference(x, weight, bias, adapters)
    torch.testing.assert_close(ours, exact)
    dy = torch.randn_like(ours)
    found, wanted = (torch.autograd.grad(y, leaves(x, bias, adapters), dy) for y in (ours, exact))
    torch.testing.assert_close(found, wanted)


@every_op
def test_gradcheck(kind: str) -> None:
    op, make = OPS[kind]
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    weight, adapter = torch.randn(OUT, IN, dtype=torch.float64), make(2, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, *factors: op(x, weight, [type(adapter)(*factors, 0.5)]), (x, *adapter.factors)
    )


@every_op
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(
    ("dtype", "factors"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_within_the_budget(kind: str, dtype: torch.dtype, factors: torch.dtype, autocast: bool) -> None:
    check_budget(kind, dtype, factors, autocast)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_lokr_in_bf16_products(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "product_dtype", lambda dtype, device: dtype)  # as where the device has such products
    check_budget("lokr", torch.bfloat16, torch.bfloat16, autocast)


def check_budget(kind: str, dtype: torch.dtype, factors: torch.dtype, autocast: bool) -> None:
    """Of factors' few numbers an error is chance: their gradients are held in the norm over several draws."""
    drawn = [draw(kind, dtype, factors, autocast) for _ in range(12)]
    for i, of_draws in enumerate(zip(*drawn, strict=True)):
        ours, theirs, eps = (torch.stack(each).norm() for each in zip(*of_draws, strict=True))
        assert ours <= 2 * theirs + eps, f"gradient {i}: {ours} for {theirs}"


def draw(kind: str, dtype: torch.dtype, factors: torch.dtype, autocast: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The output is held to its budget; of each gradient our error, PyTorch's, and one rounding, in the norm."""
    op, make = OPS[kind]
    x = torch.randn(40, IN).to(dtype).requires_grad_()
    weight, bias = torch.randn(OUT, IN).to(dtype), torch.randn(OUT).to(dtype).requires_grad_()
    adapters = [make(2, factors), make(4, factors)]
    wide = [type(a)(*[factor.detach().double().requires_grad_() for factor in a.factors], a.scaling) for a in adapters]
    x64, bias64 = (t.detach().double().requires_grad_() for t in (x, bias))
    exact = lycoris_linear_reference(x64, weight.double(), bias64, wide)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = op(x, weight, adapters, bias=bias)
        if autocast or dtype == factors:
            same = lycoris_linear_reference(x, weight, bias, adapters).to(dtype)
        else:  # as PEFT does: the update's product in the dtype of the factors
            base = torch.nn.functional.linear(x, weight, bias)
            zero = torch.zeros(OUT, IN, dtype=factors)
            same = (base + lycoris_linear_reference(x.to(factors), zero, None, adapters)).to(dtype)
    dy = torch.randn(exact.shape)
    gradients = [
        torch.autograd.grad(y, leaves(*of), dy.to(y.dtype))
        for y, of in ((ours, (x, bias, adapters)), (same, (x, bias, adapters)), (exact, (x64, bias64, wide)))
    ]
    assert_within_budget(ours, same, exact, name="output")
    return [
        (
            (found.double() - right).norm(),
            (theirs.double() - right).norm(),
            torch.finfo(found.dtype).eps * right.norm(),
        )
        for found, theirs, right in zip(*gradients, strict=True)
    ]


@every_op
def test_only_what_is_trained(kind: str) -> None:
    op, make = OPS[kind]
    x, weight, adapter = torch.randn(4, IN), torch.randn(OUT, IN), make()
    for trained in range(len(adapter.factors)):
        for i, factor in enumerate(adapter.factors):
            factor.grad = None
            factor.requires_grad_(i == trained)
        op(x, weight, [adapter]).sum().backward()
        assert [factor.grad is not None for factor in adapter.factors] == [
            i == trained for i in range(len(adapter.factors))
        ]
    adapter.factors[trained].requires_grad_(False)
    assert not op(x, weight, [adapter]).requires_grad


@every_op
def test_expanded_and_strided(kind: str) -> None:
    op, make = OPS[kind]
    x, weight, adapter = torch.randn(IN, 6).t(), torch.randn(IN, OUT).t(), make()
    x.requires_grad_()
    ours, exact = op(x, weight, [adapter]), lycoris_linear_reference(x, weight, None, [adapter])
    torch.testing.assert_close(ours, exact)
    found, wanted = (torch.autograd.grad(y.sum(), leaves(x, None, [adapter])) for y in (ours, exact))
    torch.testing.assert_close(found, wanted)


@every_op
def test_keeps_the_input_alone(kind: str) -> None:
    op, make = OPS[kind]
    x, weight, adapter = torch.randn(4, IN, requires_grad=True), torch.randn(OUT, IN), make()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        op(x, weight, [adapter])
    own = [t for t in kept if t.data_ptr() not in {leaf.data_ptr() for leaf in leaves(x, None, [adapter])}]
    assert kept and not own


def test_lokr_makes_no_matrix_of_the_weight_s_size() -> None:
    """Over a dense base, of which nothing is decoded; two adapters. LoHa's product of factors is that large."""
    weight, x = torch.randn(2048, 512), torch.randn(3, 512, requires_grad=True)
    shapes = (((32, 16), (64, 32)), ((64, 32), (32, 16)))
    adapters = [LokrAdapter(*[torch.randn(s).requires_grad_() for s in pair], 1.3) for pair in shapes]
    assert 0 < largest(lambda: lokr_linear(x, weight, adapters).sum().backward()) <= weight.nbytes // 4


@every_op
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0, 4)], ids=str)
def test_the_result_may_be_written_into(kind: str, shape: tuple[int, ...]) -> None:
    op, make = OPS[kind]
    x, weight, adapter = torch.randn(*shape, IN, requires_grad=True), torch.randn(OUT, IN), make()
    y = op(x, weight, [adapter])
    given = leaves(x, None, [adapter])
    wanted = torch.autograd.grad((2 * y).sum(), given, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y.mul_(2).sum(), given), wanted)


@every_op
def test_a_base_that_changes_before_backward(kind: str) -> None:
    op, make = OPS[kind]
    weight = torch.randn(OUT, IN)
    y = op(torch.randn(4, IN), weight, [make()])
    weight.add_(1.0)
    with pytest.raises(RuntimeError, match="was changed or moved between forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("op", "changed", "error", "message"),
    [
        (loha_linear, {"adapters": []}, ValueError, "adapters: expected at least one, got none"),
        (loha_linear, {"adapters": [lokr()]}, TypeError, r"adapters\[0\]: expected a LohaAdapter, got LokrAdapter"),
        (lokr_linear, {"adapters": loha()._replace(scaling=1)[0]}, TypeError, "adapters: expected a list or tuple"),
        (lokr_linear, {"adapters": [lokr()._replace(scaling="1")]}, TypeError, "scaling: expected a float or int"),
        (loha_linear, {"x": torch.zeros(2, 3)}, ValueError, "x: expected last size 20"),
        (
            lokr_linear,
            {"adapters": [lokr()._replace(w1=torch.zeros(2, 2))]},
            ValueError,
            r"adapters\[0\]: expected w1, w2 of two matrices whose Kronecker product is \(12, 20\), got \[\(2, 2\)",
        ),
        (
            loha_linear,
            {"adapters": [loha()._replace(w2_b=torch.zeros(2, IN))]},
            ValueError,
            r"adapters\[0\]: expected w1_a, w1_b, w2_a, w2_b of \(\(12, 3\), \(3, 20\), .*, got .*\(2, 20\)\]",
        ),
        (loha_linear, {"adapters": [loha()._replace(w1_a=torch.zeros(2).long())]}, TypeError, "floating tensor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(op: Any, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    make = loha if op is loha_linear else lokr
    arguments = {"x": torch.zeros(2, IN), "weight": torch.zeros(OUT, IN), "adapters": [make()], **changed}
    with pytest.raises(error, match=message):
        op(**arguments)
