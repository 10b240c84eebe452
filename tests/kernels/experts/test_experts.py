"""A mixture's experts as one op: numbers, gradients, odd routings, what is kept, what is allocated, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastpeft_kernels.experts import CLAMPED_SWIGLU, ExpertProjection, Experts, Gating, autograd, library, lora_experts
from fastpeft_kernels.experts.products import uses_loop
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.weights import DenseWeight, FourBitWeight
from tests.kernels.experts.mixtures import check_experts, mixture, parameters, projection, routing
from tests.kernels.lora.test_counts import products

pytestmark = pytest.mark.usefixtures("nan_filled")
FULL = pytest.mark.full
CLAMPED = Gating(CLAMPED_SWIGLU, interleaved=True, alpha=1.7, limit=1.0)
GATINGS = {
    "silu": Gating("silu"),
    "no gate": Gating("relu2", gated=False),
    "interleaved": Gating("gelu_tanh", interleaved=True),
    "clamped": CLAMPED,
    "clamped silu": Gating(CLAMPED_SWIGLU, limit=0.5, shift=0.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gating", GATINGS.values(), ids=GATINGS)
def test_within_the_budget(gating: Gating, transposed: bool, dtype: torch.dtype) -> None:
    m = mixture(gating=gating, transposed=transposed, bias=transposed, dtype=dtype)
    x = torch.randn(33, 24).to(dtype).requires_grad_()
    check_experts(x, *routing(33, 2, 4), m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_of_torch(transposed: bool, dtype: torch.dtype) -> None:
    m = mixture(features=32, gating=CLAMPED, transposed=transposed, bias=True, dtype=dtype)
    x = torch.randn(33, 24).to(dtype).requires_grad_()
    index, weights = routing(33, 2, 4)
    check_experts(x, index.clamp(max=2), weights, m, backend="grouped_mm")


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_products_in_16_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, also where this CPU multiplies in fp32 instead; the router's weights are in fp32."""
    for module in (library, autograd):
        monkeypatch.setattr(module, "product_dtype", lambda dtype, device: dtype)
    m = mixture(features=32, gating=CLAMPED, bias=True, dtype=torch.bfloat16)
    x = torch.randn(65, 24).bfloat16().requires_grad_()
    check_experts(x, *routing(65, 2, 4), m, backend=backend)


@pytest.mark.parametrize(
    "ranks", [((3,), ()), ((), (5,)), ((), ()), ((3, 4), (5,))], ids=["inner", "down", "none", "two adapters"]
)
def test_adapters_of_some_projections(ranks: Any) -> None:
    check_experts(torch.randn(9, 24, requires_grad=True), *routing(9, 2, 4), mixture(ranks=ranks, bias=True))


def test_adapters_of_another_dtype() -> None:
    """As PEFT keeps them: in fp32 over a base in 16 bits."""
    m = mixture(dtype=torch.bfloat16, lora_dtype=torch.float32)
    check_experts(torch.randn(9, 24).bfloat16().requires_grad_(), *routing(9, 2, 4), m)


def test_product_dtype_that_is_not_x_s() -> None:
    """As under autocast."""
    x = torch.randn(9, 24, requires_grad=True)
    check_experts(x, *routing(9, 2, 4, torch.bfloat16), mixture(), torch.bfloat16)


@pytest.mark.parametrize(
    "index",
    [
        torch.zeros(7, 1, dtype=torch.int64),
        torch.tensor([[3, 3], [3, 1], [3, 3]]),
        torch.tensor([[2, 0]], dtype=torch.int32),
        torch.zeros(0, 2, dtype=torch.int64),
        torch.zeros(3, 0, dtype=torch.int64),
    ],
    ids=["one takes all", "one twice for a token", "one token", "no token", "no choice"],
)
def test_odd_routings(index: Tensor) -> None:
    x = torch.randn(index.shape[0], 24, requires_grad=True)
    check_experts(x, index, torch.rand(index.shape, requires_grad=True), mixture(bias=True))


def test_sizes_of_one_and_columns_apart() -> None:
    check_experts(torch.randn(5, 2)[:, :1].requires_grad_(), *routing(5, 1, 1), mixture(1, 1, 1, ranks=((1,), (1,))))


def _frozen(which: str) -> Callable[[Tensor, Tensor, Experts], list[Tensor]]:
    chosen: dict[str, Callable[[Tensor, Tensor, Experts], list[Tensor]]] = {
        "x": lambda x, w, m: [x],
        "weights": lambda x, w, m: [w],
        "x and weights": lambda x, w, m: [x, w],
        "A": lambda x, w, m: [m.inner.adapters[0].a, m.down.adapters[0].a],
        "B": lambda x, w, m: [m.inner.adapters[0].b, m.down.adapters[0].b],
        "inner": lambda x, w, m: [x, w, *parameters([m.inner])],
        "down": lambda x, w, m: [x, w, *parameters([m.down])],
        "all but A of down": lambda x, w, m: [x, w, *parameters([m.inner]), m.down.adapters[0].b],
        "all but B of down": lambda x, w, m: [x, w, *parameters([m.inner]), m.down.adapters[0].a],
    }
    return chosen[which]


@pytest.mark.parametrize(
    "which",
    ["x", "weights", "x and weights", "A", "B", "inner", "down", "all but A of down", "all but B of down"],
)
def test_frozen_in_each_combination(which: str) -> None:
    m, x, (index, weights) = mixture(bias=True), torch.randn(9, 24, requires_grad=True), routing(9, 2, 4)
    for tensor in _frozen(which)(x, weights, m):
        tensor.requires_grad_(False)
    check_experts(x, index, weights, m)


def test_gradients_in_fp64() -> None:
    m = mixture(3, 5, 4, gating=CLAMPED, ranks=((2,), (3,)), dtype=torch.float64, bias=True)
    x, (index, weights) = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), routing(6, 2, 3, torch.float64)
    every = (x, weights, *parameters(m.projections))
    assert torch.autograd.gradcheck(lambda x, w, *_: lora_experts(x, index, w, m), every)


def test_weights_in_4_bits_are_decoded_an_expert_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def quantised(p: ExpertProjection) -> ExpertProjection:
        return ExpertProjection(FourBitWeight(encode_4bit(p.weight.decode())), p.experts, adapters=p.adapters)

    dense = mixture(in_features=64, features=64)
    m = Experts(quantised(dense.inner), quantised(dense.down), dense.gating)
    decoded = []
    decode = FourBitWeight.decode
    monkeypatch.setattr(
        FourBitWeight, "decode", lambda self, *a, **k: decoded.append(k["rows"]) or decode(self, *a, **k)
    )
    index = torch.tensor([[1], [3], [1]])
    lora_experts(torch.randn(3, 64), index, torch.rand(3, 1), m)
    assert decoded == [(128, 256), (384, 512), (64, 128), (192, 256)]
    monkeypatch.undo()
    check_experts(torch.randn(33, 64, requires_grad=True), *routing(33, 2, 4), m)


class Sizes(TorchDispatchMode):
    """The most numbers of any storage that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view:
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_stack_of_matrices_is_made() -> None:
    """Forward and backward make nothing of the size of the experts' weights, nor of half of them."""
    m, x, (index, weights) = mixture(16, 48, 64, ranks=((2,), (2,))), torch.randn(8, 48), routing(8, 2, 16)
    with Sizes() as sizes:
        lora_experts(x.requires_grad_(), index, weights, m).sum().backward()
    assert m.inner.weight.shape[0] * m.inner.weight.shape[1] == 16 * 128 * 48
    assert 0 < sizes.largest <= 16 * 128 * 2 * 2  # a B, and its rank once more


def test_what_is_kept() -> None:
    """x, gate and up, both S, weights and the routing; no row of x, no activation, no output."""
    m, x, (index, weights) = mixture(ranks=((3,), (5,))), torch.randn(9, 24, requires_grad=True), routing(9, 2, 4)
    kept: list[Tensor] = []
    own = {t.untyped_storage()._cdata for t in (*parameters(m.projections),)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_experts(x, index, weights, m)
    sizes = sorted(t.numel() for t in kept if t.untyped_storage()._cdata not in own)
    assert sizes == sorted([9 * 24, 18 * 32, 18 * 3, 18 * 5, 18, 18, 18, 18, 4])


def test_a_changed_weight_is_noticed() -> None:
    m, x, (index, weights) = mixture(), torch.randn(9, 24, requires_grad=True), routing(9, 2, 4)
    y = lora_experts(x, index, weights, m)
    assert isinstance(m.down.weight, DenseWeight)
    m.down.weight.weight.mul_(2)
    with pytest.raises(RuntimeError, match="frozen base weight"):
        y.sum().backward()


def test_a_changed_bias_is_noticed() -> None:
    """That of the down projection is read again, for the gradient of the weights."""
    m, x, (index, weights) = mixture(bias=True), torch.randn(9, 24, requires_grad=True), routing(9, 2, 4)
    y = lora_experts(x, index, weights, m)
    assert m.down.bias is not None
    m.down.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class _Waits(TorchDispatchMode):
    """Counts numbers that the host asks for, one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_waits_for_the_device_once() -> None:
    """The loop reads how many rows each expert has, in one piece, and no number beside."""
    m, x, (index, weights) = mixture(), torch.randn(9, 24, requires_grad=True), routing(9, 2, 4)
    with _Waits() as waits:
        lora_experts(x, index, weights, m).sum().backward()
    assert waits.count == 0


@pytest.mark.parametrize("gating", GATINGS.values(), ids=GATINGS)
def test_a_graph_that_is_kept_gives_the_same_again(gating: Gating) -> None:
    """The last pass writes over what was kept; one before it must not."""
    m, x, (index, weights) = mixture(gating=gating), torch.randn(9, 24, requires_grad=True), routing(9, 2, 4)
    y, wanted = lora_experts(x, index, weights, m), (x, weights, *parameters(m.projections))
    first, second, last = (torch.autograd.grad(y.sum(), wanted, retain_graph=again) for again in (True, True, False))
    for a, b, c in zip(first, second, last, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_recomputation_ends_before_the_down_projection() -> None:
    """Products of a step: the frozen and the adapters' of 4 experts; again, those of inner and S of down alone."""
    m, x, (index, weights) = mixture(), torch.randn(50, 24, requires_grad=True), routing(50, 3, 4)
    plain, _ = products(lambda: lora_experts(x, index, weights, m).sum().backward())

    def recomputed() -> None:
        checkpoint(lora_experts, x, index, weights, m, use_reentrant=False).sum().backward()

    again, _ = products(recomputed)
    assert plain == 4 * (2 * 3 + 2 * 5)
    assert again == plain + 4 * (3 + 1)


def test_twice_the_same() -> None:
    m, x, (index, weights) = mixture(), torch.randn(50, 24), routing(50, 3, 4)
    assert torch.equal(lora_experts(x, index, weights, m), lora_experts(x, index, weights, m))


def _bad(**changes: Any) -> Callable[[], Any]:
    def call() -> Any:
        given: dict[str, Any] = {
            "x": torch.randn(3, 24),
            "index": torch.zeros(3, 2, dtype=torch.int64),
            "weights": torch.rand(3, 2),
            "experts": mixture(),
        }
        return lora_experts(**{**given, **changes})

    return call


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (_bad(x=torch.randn(3, 23)), ValueError, r"x: expected shape \(rows, 24\), got \(3, 23\)"),
        (_bad(x=torch.ones(3, 24, dtype=torch.int64)), TypeError, "x: expected a floating tensor, got torch.int64"),
        (_bad(index=torch.zeros(3, 2)), TypeError, "index: expected a dtype of"),
        (_bad(index=torch.zeros(4, 2, dtype=torch.int64)), ValueError, r"index: expected shape \(3, top_k\)"),
        (_bad(index=torch.full((3, 2), 4)), ValueError, r"index: expected experts in \[0, 4\), got 4 to 4"),
        (_bad(index=torch.full((3, 2), -1)), ValueError, r"index: expected experts in \[0, 4\), got -1 to -1"),
        (_bad(weights=torch.rand(3, 3)), ValueError, r"weights: expected shape \(3, 2\), got \(3, 3\)"),
        (_bad(experts=mixture(gating=Gating("tanh"))), ValueError, "gating.kind: expected one of"),
        (
            _bad(experts=mixture(gating=Gating(CLAMPED_SWIGLU, gated=False))),
            ValueError,
            "gating.gated: expected a gate",
        ),
        (
            _bad(experts=Experts(projection(4, 24, 32), projection(4, 15, 24), Gating("silu"))),
            ValueError,
            "experts.down: expected 4 experts of 16 inputs and 24 outputs, got 4 of 15 and 24",
        ),
        (_bad(dtype=torch.int8), TypeError, "dtype: expected one of"),
        (_bad(backend="cublas"), ValueError, "backend: expected one of"),
        (_bad(experts=mixture(ranks=((3,), (3,))), backend="grouped_mm"), ValueError, "rows of multiples of 16 bytes"),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_cpu_loops() -> None:
    assert uses_loop("auto", mixture().projections, torch.float32)
