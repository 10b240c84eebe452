"""Mixed batches by C++: the bits of the way through Python, its errors, and what it keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.lora import Dtypes, LoraProjection, autograd, direct, mixed_native
from fastpeft_kernels.lora.projection import Group
from fastpeft_kernels.native.extension import group_extension
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.weights import FourBitWeight
from tests.kernels.lora.groups import parameters, projection
from tests.kernels.lora.test_direct import by_python, run
from tests.kernels.lora.test_mixed import WAYS, siblings

pytestmark = pytest.mark.skipif(group_extension(wait=True) is None, reason="needs a C++ compiler")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def mixed(index: list[int], group: list[LoraProjection], *dtypes: torch.dtype) -> Group:
    return Group(group, Dtypes(*(dtypes or (F32, F32, F32))), [None] * len(group), "auto", tuple(index))


def same(x: Tensor, group: Group, skip: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the C++ node, by Python with C++ for its parts, and by Python alone."""
    assert direct.serves(x, group)
    ours, parts = run(direct.apply, x, group, skip), run(by_python, x, group, skip)
    with monkeypatch.context() as patch:
        patch.setattr(mixed_native, "owned", lambda group: None)
        theirs = run(by_python, x, group, skip)
    for found in (ours, parts):
        assert len(found) == len(theirs)
        for i, (a, b) in enumerate(zip(found, theirs, strict=True)):
            assert (a is None) == (b is None), f"result {i}"
            if a is not None and b is not None:
                assert a.dtype == b.dtype and torch.equal(a, b), f"result {i}: {(a - b).abs().max()}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "dtypes", [(F32, F32, F32), (BF16, BF16, BF16), (BF16, F32, BF16), (F16, F32, F32), (F64, F64, F64)], ids=str
)
def test_the_same_bits(way: str, dtypes: tuple[torch.dtype, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    index, each = WAYS[way]
    group = mixed(index, siblings(dtypes[0], F32 if dtypes[0] != F64 else F64), *dtypes)
    for skip in (None, 0, 1, 2):
        same(torch.randn(6, each, 24).to(dtypes[0]).requires_grad_(), group, skip, monkeypatch)
    same(torch.randn(6, each, 24).to(dtypes[0]), group, None, monkeypatch)


@pytest.mark.parametrize("scalings", [(2.0, 2.0, 2.0), (1.0, 1.0, 1.0), (1 / 3, 2, 0.0)])
@pytest.mark.parametrize("index", [[0, 0, 1, 1, 2, 2], [2, 0, -1, 0, 2, 2], [1, 1, 1, 1, 5, 1], [7] * 6], ids=str)
def test_scalings_and_adapters_without_rows(
    scalings: tuple[float, ...], index: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = [
        replace(p, adapters=tuple(replace(a, scaling=scalings[a.index]) for a in p.adapters))
        for p in siblings(BF16, F32)
    ]
    same(torch.randn(6, 2, 24).to(BF16).requires_grad_(), mixed(index, group, BF16, BF16, BF16), None, monkeypatch)


def test_four_bits_and_adapters_of_two_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    p = projection(64, 32, 4, 4)
    first, second = p.adapters
    half = replace(first, a=first.a.detach().to(BF16).requires_grad_(), b=first.b.detach().to(BF16).requires_grad_())
    p = LoraProjection(
        FourBitWeight(encode_4bit(torch.randn(32, 64), nested=True)), None, (half, replace(second, index=1))
    )
    same(torch.randn(4, 3, 64, requires_grad=True), mixed([0, 1, 1, 0], [p]), None, monkeypatch)


@pytest.mark.parametrize("trained", ["a", "b", "one", ""])
def test_what_is_frozen_has_no_gradient(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = siblings()
    for p in group:
        for each in p.adapters:
            each.a.requires_grad_(trained == "a" or (trained == "one" and each.index == 2))
            each.b.requires_grad_(trained == "b" or (trained == "one" and each.index == 1))
    same(torch.randn(6, 2, 24, requires_grad=True), mixed([2, 0, -1, 0, 2, 2], group), None, monkeypatch)


@pytest.mark.parametrize("shape", [(0, 5, 24), (3, 0, 24), (1, 1, 24), (3, 24)], ids=str)
def test_few_and_no_tokens(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    same(torch.randn(shape, requires_grad=True), mixed([2, 0, 2][: shape[0]], siblings()), None, monkeypatch)


def test_no_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    same(torch.randn(3, 2, 24, requires_grad=True), mixed([0, 1, 0], [projection(24, 8)]), None, monkeypatch)
    same(torch.randn(0, 2, 24, requires_grad=True), mixed([], [projection(24, 8)]), None, monkeypatch)


def test_strided_and_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    group = mixed([2, 0, -1, 0], siblings())
    same(torch.randn(24, 2, 4).permute(2, 1, 0).requires_grad_(), group, None, monkeypatch)
    x = torch.randn(4, 2, 24, requires_grad=True)
    ours, theirs = (torch.autograd.grad(way(x, group)[0].sum(), x) for way in (direct.apply, by_python))
    assert torch.equal(*ours, *theirs)


def test_what_is_kept_is_in_the_same_order() -> None:
    """A recomputation may find the C++ that was not there yet in forward."""

    def kept(way: Any) -> list[torch.Size]:
        sizes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
            way(torch.randn(4, 2, 24, requires_grad=True), mixed([2, 0, -1, 0], siblings()))
        return sizes

    assert kept(direct.apply) == kept(by_python)


def test_changes_are_noticed() -> None:
    for written, message in (
        (lambda p: p.weight.decode(), "changed or moved between forward and backward"),
        (lambda p: p.adapters[1].b.detach(), "modified by an inplace operation"),
    ):
        group = siblings()
        ys = direct.apply(torch.randn(4, 2, 24, requires_grad=True), mixed([2, 0, -1, 0], group))
        written(group[0]).add_(1.0)
        with pytest.raises(RuntimeError, match=message):
            ys[0].sum().backward()


def test_a_second_time_and_twice() -> None:
    x, group = torch.randn(4, 2, 24, requires_grad=True), mixed([2, 0, -1, 0], siblings())
    ys = direct.apply(x, group)
    first = torch.autograd.grad(ys[0].square().sum(), [x, *parameters(list(group.projections))[:6]], retain_graph=True)
    second = torch.autograd.grad(ys[0].square().sum(), [x, *parameters(list(group.projections))[:6]])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    (dx,) = torch.autograd.grad(direct.apply(x, group)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_what_it_leaves_to_python() -> None:
    x, group = torch.randn(6, 2, 24, requires_grad=True), siblings()
    index = [2, 0, -1, 0, 2, 2]
    assert direct.serves(x, mixed(index, group))
    assert direct.serves(torch.randn(6, 2048, 24), mixed(index, group)), "no product of ours is faster there"
    tensor = [replace(p, adapters=tuple(replace(a, scaling=torch.tensor(2.0)) for a in p.adapters)) for p in siblings()]
    assert not direct.serves(x, mixed(index, tensor))
    assert not direct.serves(x, replace(mixed(index, group), seeds=[torch.tensor([1]), None, None]))
    assert not direct.serves(x, replace(mixed(index, group), backend="triton"))


def test_autograd_chooses_it() -> None:
    ys = autograd.apply(torch.randn(6, 2, 24, requires_grad=True), mixed([2, 0, -1, 0, 2, 2], siblings()))
    assert type(ys[0].grad_fn).__name__ == "CppFunction"
