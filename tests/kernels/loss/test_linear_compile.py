"""The fused loss under torch.compile, selective checkpointing and autocast, without values, and in backward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft_kernels.loss import Head, blocks, linear_cross_entropy
from fastpeft_kernels.weights import DenseWeight
from tests.kernels.compiling import check_changing_sizes, check_one_graph, check_selective_checkpointing

from .heads import Case, make_case

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")

CASES: dict[str, dict[str, Any]] = {
    "frozen": {"storage": "four_bit", "rank": 2, "z_loss": 1e-2},
    "trained": {"frozen": False, "rank": 2, "bias": True, "label_smoothing": 0.1, "class_weight": True},
}
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ON_CPU", (4, 7))


def asked(case: Case, hidden: Tensor) -> tuple[Tensor, ...]:
    """Loss and log-probabilities; without ignored labels, so that the blocks are the same compiled or not."""
    other = Case({**case.tensors, "hidden": hidden}, case.labels, case.stored, case.scale, case.softcap, case.options)
    out = other.call(log_probs=True, entropy=True)
    assert out.log_probs is not None and out.entropy is not None
    return out.loss + 0.0 * out.entropy.sum(), out.log_probs


def parameters(case: Case) -> list[Tensor]:
    return [x for name, x in case.tensors.items() if x.requires_grad and name != "hidden"]


@pytest.mark.parametrize(
    "name, backend",
    [*((name, "aot_eager") for name in CASES), pytest.param("frozen", "inductor", marks=pytest.mark.full)],
)
def test_one_graph(name: str, backend: str) -> None:
    case = make_case(9, ignored=0.0, **CASES[name])
    roundings = 4 if backend == "inductor" else 0  # of what makes losses of the op's results
    check_one_graph(lambda x: asked(case, x), case.tensors["hidden"], parameters(case), backend, roundings)


def test_ignored_tokens_in_one_graph() -> None:
    """They are computed there, and count for nothing."""
    case = make_case(3, 5, dtype=torch.bfloat16, ignored=0.5)
    function = torch.compile(lambda x: asked(case, x), fullgraph=True, backend="aot_eager")
    x = case.tensors["hidden"]
    eager, traced = asked(case, x), function(x)
    torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-6)
    ours, want = (torch.autograd.grad(outs[0], x)[0] for outs in (traced, eager))
    torch.testing.assert_close(ours, want)


@pytest.mark.full
def test_changing_sizes() -> None:
    head = Head(DenseWeight(torch.randn(23, 64)))

    def function(x: Tensor) -> Tensor:
        labels = x.detach()[..., 0].abs().long().clamp(max=22)
        return linear_cross_entropy(x, head, labels, reduction="none").loss

    check_changing_sizes(function)


@every_case
def test_selective_checkpointing(name: str) -> None:
    case = make_case(9, ignored=0.0, **CASES[name])
    for saved in ("mm", "everything"):
        check_selective_checkpointing(lambda x: asked(case, x)[0], case.tensors["hidden"], parameters(case), saved)


@every_case
def test_meta(name: str) -> None:
    case = make_case(9, **CASES[name] | {"storage": "dense"})
    tensors = {n: x.detach().to("meta").requires_grad_(x.requires_grad) for n, x in case.tensors.items()}
    options = {n: x.to("meta") if isinstance(x, Tensor) else x for n, x in case.options.items()}
    stored = None if case.stored is None else DenseWeight(torch.empty(24, 16, device="meta"))
    other = Case(tensors, case.labels.to("meta"), stored, options=options)
    out = other.call()
    assert out.loss.shape == () and out.loss.dtype == torch.float32
    wanted = [x for x in tensors.values() if x.requires_grad]
    for gradient, x in zip(torch.autograd.grad(out.loss, wanted), wanted, strict=True):
        assert gradient.shape == x.shape


@pytest.mark.parametrize("trained", (False, True))
def test_autocast(trained: bool) -> None:
    """Products in autocast's dtype, or what the CPU makes of it; fp32 parameters get fp32 gradients."""
    case = make_case(9, frozen=not trained, rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.call()
    assert out.loss.dtype == torch.float32
    want = make_case(9).call().loss  # another draw
    assert not torch.equal(out.loss, want)
    exact = case.call(reduction="mean").loss
    assert (out.loss - exact).abs() < 0.05 * exact
    given = torch.autograd.grad(out.loss, [x for x in case.tensors.values() if x.requires_grad])
    assert {gradient.dtype for gradient in given} == {torch.float32}


@every_case
def test_backward_twice_and_once_only(name: str) -> None:
    case = make_case(9, **CASES[name])
    wanted = [x for x in case.tensors.values() if x.requires_grad]
    loss = case.call().loss
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(2 * loss, wanted)
    torch.testing.assert_close(second, [2 * x for x in kept])
    torch.testing.assert_close(first, tuple(kept), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, wanted)
    factor = torch.ones((), requires_grad=True)
    gradient = torch.autograd.grad(case.call().loss * factor, wanted, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@every_case
def test_the_same_twice(name: str) -> None:
    case = make_case(9, **CASES[name])
    wanted = [x for x in case.tensors.values() if x.requires_grad]
    runs = [torch.autograd.grad(case.call().loss, wanted) for _ in range(2)]
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_writes_before_backward_are_noticed() -> None:
    weight = torch.randn(23, 8)
    hidden, labels = torch.randn(5, 8, requires_grad=True), torch.randint(0, 23, (5,))
    s, b = torch.randn(5, 2), torch.randn(23, 2, requires_grad=True)
    loss = linear_cross_entropy(hidden, Head(DenseWeight(weight), None, s, b), labels).loss
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="was changed or moved between forward and backward"):
        loss.backward()
    trained = torch.randn(23, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, Head(trained), labels).loss
    with torch.no_grad():
        trained.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_write_after_which_nothing_is_read_again() -> None:
    """The gradient of a frozen head lies ready: an optimizer's step on a tied embedding between may not fail it."""
    weight = torch.randn(23, 8)
    hidden, labels = torch.randn(5, 8, requires_grad=True), torch.randint(0, 23, (5,))
    want = torch.autograd.grad(F.cross_entropy(F.linear(hidden, weight), labels), hidden)[0]
    loss = linear_cross_entropy(hidden, Head(DenseWeight(weight)), labels).loss
    weight.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], want)


def test_without_gradients() -> None:
    case = make_case(9, frozen=False, rank=2)
    with torch.no_grad():
        assert not case.call().loss.requires_grad
    frozen = make_case(9, hidden_trained=False)
    assert not frozen.call().loss.requires_grad
