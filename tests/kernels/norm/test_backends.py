"""PyTorch's ways on a CPU: within the budget for every kind, dtype, size and set of trained tensors."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from fastpeft_kernels.norm import layer_norm, library, rms_norm

from .conftest import DTYPES, KINDS, SHAPES, Case, hold, make_case, results

pytestmark = pytest.mark.usefixtures("nan_filled")

every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@every_kind
@every_dtype
def test_within_budget(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_BLOCK", 150)  # two rows of the widest but one, less than one of the widest
    for shape in SHAPES:
        hold(make_case(kind, shape, dtype), "torch")


@every_kind
@pytest.mark.parametrize(("dtype", "weight"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_weights_of_another_dtype(kind: str, dtype: torch.dtype, weight: torch.dtype) -> None:
    case = make_case(kind, (7, 33), dtype, weight=weight)
    hold(case, "auto")
    assert case.ours("auto").dtype == case.plain().dtype


@every_kind
def test_fp64_and_no_weight(kind: str) -> None:
    case, dy = make_case(kind, (7, 33), torch.float64), torch.randn(7, 33)
    torch.testing.assert_close(
        results(case.leaves(), lambda c: c.ours("auto"), dy), results(case.leaves(), Case.plain, dy)
    )
    if kind != "gemma":
        hold(make_case(kind, (7, 33), torch.float32, bare=True), "torch")


@every_dtype
def test_pytorch_s_own(dtype: torch.dtype) -> None:
    for kind in ("input", "once", "layer"):
        hold(make_case(kind, (7, 33), dtype), "aten")


def test_any_strides() -> None:
    whole = torch.randn(6, 4, 10)
    for x in (whole.transpose(0, 1), whole.transpose(1, 2), whole[..., ::2], whole[:1].expand(3, 4, 10)):
        weight = torch.randn(x.shape[-1])
        hold(Case("input", x, weight, None), "torch")


@every_kind
def test_only_what_is_trained_gets_a_gradient(kind: str) -> None:
    case, dy = make_case(kind, (6, 12), torch.float32), torch.randn(6, 12)
    whole = results(case.leaves(), lambda c: c.ours("torch"), dy)
    for trained in product((False, True), repeat=len(case.tensors())):
        leaves = case.leaves()
        for tensor, wanted in zip(leaves.tensors().values(), trained, strict=True):
            tensor.requires_grad_(wanted)
        y = leaves.ours("torch")
        assert y.requires_grad == any(trained)
        if any(trained):
            y.backward(dy)
        for (name, tensor), wanted in zip(leaves.tensors().items(), trained, strict=True):
            assert (tensor.grad is not None) == wanted, name
            if wanted:
                torch.testing.assert_close(tensor.grad, whole[f"d{name}"])


@pytest.mark.parametrize("norm", (rms_norm, layer_norm))
def test_nothing_of_x_s_size_is_kept_but_x(norm: Any) -> None:
    x, weight = torch.randn(10, 64, dtype=torch.bfloat16, requires_grad=True), torch.ones(64, dtype=torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x, weight, eps=1e-5, backend="torch")
    others = [t for t in kept if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert [t.nbytes for t in others] == [4 * 10] * (2 if norm is layer_norm else 1)


def test_autocast_changes_nothing() -> None:
    for kind in KINDS:
        case = make_case(kind, (5, 40), torch.bfloat16)
        plain = case.ours("torch"), case.ours("auto")
        with torch.autocast("cpu", dtype=torch.float16):
            within = case.ours("torch"), case.ours("auto")
        assert all(torch.equal(a, b) for a, b in zip(plain, within, strict=True))


def test_the_same_twice_and_inputs_untouched() -> None:
    case = make_case("gemma", (50, 40), torch.float32)
    before = {name: t.clone() for name, t in case.tensors().items()}
    dy = torch.randn(50, 40)
    first, second = (results(case.leaves(), lambda c: c.ours("torch"), dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(t, before[name]) for name, t in case.tensors().items())


@pytest.mark.parametrize("shape", [(3, 0), (0,), (2, 3, 0)])
def test_no_features(shape: tuple[int, ...]) -> None:
    x, weight = (torch.randn(size, requires_grad=True) for size in (shape, shape[-1:]))
    rms_norm(x, weight, 1e-6).sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    assert weight.grad is not None and weight.grad.shape == (0,)


@pytest.mark.parametrize("shape", [(2, 3, 8), (3, 8), (8,), (0, 8)], ids=str)
def test_the_result_may_be_written_into(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(8, requires_grad=True)
    y = rms_norm(x, weight, 1e-6, backend="torch")
    wanted = torch.autograd.grad((2 * y).sum(), (x, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y.mul_(2).sum(), (x, weight)), wanted)
