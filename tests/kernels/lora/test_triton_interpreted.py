"""The Triton kernels in Triton's interpreter: every configuration, and whole groups, within the error budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.common.random import dropout
from fastpeft_kernels.lora import Dtypes, LoraAdapter, LoraProjection, lora_linear, lora_linear_group, parts
from fastpeft_kernels.weights import DenseWeight
from tests.budget import assert_within_budget
from tests.kernels.lora.groups import adapter, check_group, parameters, projection, seeds_for

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("nan_filled")]
pytest.importorskip("triton")

F32, F16, F64 = torch.float32, torch.float16, torch.float64  # the interpreter computes bfloat16 wrongly
SAME = {dtype: Dtypes(dtype, dtype, dtype) for dtype in (F32, F16)}
TOKENS, FEATURES, RANK = 37, 50, 20  # no tile divides these; more ranks than the smallest tile
LONG = 150  # tokens for several splits of several blocks each
every_dtype = pytest.mark.parametrize("dtype", (F32, F16), ids=("fp32", "fp16"))
drops_or_not = pytest.mark.parametrize("p", (0.0, 0.4), ids=("", "dropout"))


def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns).to(dtype)


def dropped(x: Tensor, p: float, like: torch.dtype) -> Tensor:
    return dropout(x.to(like), SEED, p, 2) if p else x.to(like)


def check(ours: Tensor, formula: Callable[..., Tensor], *operands: Tensor) -> None:
    """`ours` is `formula` of the operands, within the budget of their own dtype."""
    assert_within_budget(ours, formula(*operands).to(ours.dtype), formula(*(t.double() for t in operands)))


SEED = torch.tensor([-(2**61) + 7])


def configs(*names: str) -> list[Any]:
    from fastpeft_kernels.lora import configs

    return [configs.TINY, *(config for name in names for config in getattr(configs, name))]


@every_dtype
@drops_or_not
def test_down_in_every_configuration(dtype: torch.dtype, p: float) -> None:
    from fastpeft_kernels.lora.forward import lora_down

    x, a = matrix(TOKENS, FEATURES, dtype), matrix(RANK, FEATURES, dtype)
    for config in configs("DOWN"):
        s = lora_down(x, a, seed=SEED, p=p, stream=2, config=config)
        check(s, lambda x, a: dropped(x, p, x.dtype) @ a.t(), x, a)


@every_dtype
def test_linear_in_every_configuration(dtype: torch.dtype) -> None:
    from fastpeft_kernels.lora.forward import lora_linear

    x, w, bias = matrix(TOKENS, FEATURES, dtype), matrix(70, FEATURES, dtype), torch.randn(70).to(dtype)
    s, b = matrix(TOKENS, RANK, dtype), matrix(70, RANK, dtype)
    for config in configs("LINEAR"):
        y = lora_linear(x, w, s, b, bias, config=config)
        check(y, lambda x, w, s, b, bias: x @ w.t() + s @ b.t() + bias, x, w, s, b, bias)
        before = matrix(TOKENS, 70, dtype)
        turned = w.t().contiguous().t(), s, b.t().contiguous().t()
        y = lora_linear(x, *turned, out=before.clone(), accumulate=True, config=config)
        check(y, lambda x, w, s, b, y: y + x @ w.t() + s @ b.t(), x, w, s, b, before)


def through_descriptors() -> list[Any]:
    """Every configuration, and a small one of which each of the interpreter's four programs takes several tiles."""
    from fastpeft_kernels.lora.configs import LINEAR_TMA, Config

    return [*LINEAR_TMA, Config(16, 32, 16, 16, tma=True, group_m=2, persistent=True, parts=4)]


@pytest.mark.parametrize("turned", ("neither", "w", "b", "both"))
def test_linear_through_descriptors(turned: str) -> None:
    from fastpeft_kernels.lora.forward import lora_linear

    def laid_out(name: str, t: Tensor) -> Tensor:
        return t.t().contiguous().t() if turned in (name, "both") else t

    x, w, bias = matrix(37, 40, F16), laid_out("w", matrix(72, 40, F16)), torch.randn(72).to(F16)
    s, b = matrix(37, 32, F16)[:, 8:32], laid_out("b", matrix(72, 24, F16))
    for config in through_descriptors():
        y = lora_linear(x, w, s, b, bias, config=config)
        check(y, lambda x, w, s, b, bias: x @ w.t() + s @ b.t() + bias, x, w, s, b, bias)
        check(lora_linear(x, w, config=config), lambda x, w: x @ w.t(), x, w)
        for before in (matrix(37, 72, F16), matrix(37, 72, F32)):
            y = lora_linear(x, w, s, b, out=before.clone(), accumulate=True, config=config)
            check(y, lambda x, w, s, b, y: y + (x @ w.t() + s @ b.t()).to(y.dtype), x, w, s, b, before)
        for wrong in (x[:, 1:], x.t().contiguous().t()[:, 1:]):  # rows unaligned; columns apart
            with pytest.raises(ValueError, match="operands: expected one 16-bit dtype, rows at multiples of 16 bytes"):
                lora_linear(wrong, w[:, 1:], config=config)
    with pytest.raises(ValueError, match="operands: expected one 16-bit dtype"):
        lora_linear(torch.randn(40, 40).to(F16).t(), w, config=config)


@pytest.mark.parametrize("turned", ("neither", "w", "both"))
@pytest.mark.parametrize("count", (2, 3))
def test_sums_of_products(count: int, turned: str) -> None:
    from fastpeft_kernels.lora.configs import LINEAR
    from fastpeft_kernels.lora.forward import lora_linear

    def laid_out(name: str, t: Tensor) -> Tensor:
        return t.t().contiguous().t() if turned in (name, "both") else t

    sizes = (40, 24, 8)[:count]
    pairs = [(matrix(37, size, F16), laid_out("w", matrix(72, size, F16))) for size in sizes]
    s, b, before = matrix(37, 24, F16), laid_out("b", matrix(72, 24, F16)), matrix(37, 72, F16)
    operands = [s, b, before, *(t for pair in pairs for t in pair)]

    def formula(s: Tensor, b: Tensor, before: Tensor, *factors: Tensor) -> Tensor:
        return before + s @ b.t() + sum(x @ w.t() for x, w in zip(factors[::2], factors[1::2], strict=True))

    for config in (through_descriptors()[0], through_descriptors()[-1], LINEAR[0]):
        y = lora_linear(*pairs[0], s, b, more=pairs[1:], out=before.clone(), accumulate=True, config=config)
        check(y, formula, *operands)


def test_up_backward_in_every_configuration() -> None:
    from fastpeft_kernels.lora.backward import lora_up_bwd

    dy, b, s = matrix(LONG, FEATURES, F16), matrix(FEATURES, 11, F16), matrix(LONG, 11, F16)
    for config in configs("UP"):
        ds = torch.empty(LONG, 16, dtype=F16)[:, 2:13]
        db = lora_up_bwd(dy, b, s, ds, config=config)
        check(ds, lambda dy, b: dy @ b, dy, b)
        check(db.sum(0), lambda dy, s: dy.t() @ s, dy.float(), s.float())
    with pytest.raises(ValueError, match="b: expected a rank of at most 16, got 17"):
        lora_up_bwd(dy, matrix(FEATURES, 17, F16), s, ds)


@every_dtype
@drops_or_not
def test_weight_gradient_in_every_configuration(dtype: torch.dtype, p: float) -> None:
    from fastpeft_kernels.lora.backward import lora_down_bwd_weight

    x, ds = matrix(LONG, FEATURES, dtype), matrix(LONG, RANK, dtype)
    for config in configs("WEIGHT"):
        da = lora_down_bwd_weight(x, ds, seed=SEED, p=p, stream=2, config=config)
        # fp32 throughout: the partial sums are fp32 whatever the operands are
        check(da.sum(0), lambda x, ds: ds.t() @ dropped(x, p, x.dtype), x.float(), ds.float())
    turned = lora_down_bwd_weight(x, ds, seed=SEED, p=p, stream=2, config=config, features_first=True)
    assert turned.shape[1:] == (FEATURES, RANK) and torch.equal(turned.transpose(1, 2), da)


@every_dtype
@drops_or_not
def test_input_gradient_in_every_configuration(dtype: torch.dtype, p: float) -> None:
    from fastpeft_kernels.lora.backward import lora_down_bwd_input_

    ds, a, before = matrix(TOKENS, RANK, dtype), matrix(RANK, FEATURES, dtype), matrix(TOKENS, FEATURES, dtype)
    for config in configs("INPUT"):
        dx = before.clone()
        version = dx._version
        assert lora_down_bwd_input_(dx, ds, a, seed=SEED, p=p, stream=2, config=config) is dx
        check(dx, lambda ds, a, dx: dx + dropped(ds @ a, p, ds.dtype), ds, a, before)
        assert dx._version > version, "autograd cannot see the write"


@pytest.mark.parametrize("factor", (1.0, -0.5, torch.tensor(3.0), torch.tensor(0.25, dtype=F64)), ids=str)
def test_sum_of_partial_sums(factor: float | Tensor) -> None:
    from fastpeft_kernels.lora.partial_sums import lora_sum

    partial = torch.randn(5, 40, 30)
    out = torch.empty(30, 40, dtype=F16).t()
    assert lora_sum(partial, out, factor) is out
    assert_within_budget(out, (partial.sum(0) * factor).to(F16), partial.double().sum(0) * factor)


@pytest.mark.parametrize("lora", (F32, F16), ids=("fp32", "fp16"))
def test_packs_what_the_library_packs(lora: torch.dtype) -> None:
    from fastpeft_kernels.lora.packing import pack

    group = [
        projection(24, 40, 3, 8, lora_dtype=F32, scaling=0.3, with_bias=True),
        projection(24, 7),
        projection(24, 33, 1, 4, lora_dtype=F16, scaling=torch.tensor(1.7)),
        projection(24, 16, 17, lora_dtype=F32),
    ]
    ours, theirs = pack(group, lora), parts.pack(group, lora)
    assert ours.a is not None and theirs.a is not None
    pairs = [(ours.a, theirs.a), *zip(ours.b, theirs.b, strict=True), *zip(ours.bias, theirs.bias, strict=True)]
    for mine, other in pairs:
        assert (mine is None) == (other is None)
        assert mine is None or other is None or (mine.dtype == other.dtype and torch.equal(mine, other))
    assert pack([projection(24, 7)], lora).a is None


@every_dtype
@drops_or_not
def test_siblings_with_several_adapters_biases_and_a_bare_one(dtype: torch.dtype, p: float) -> None:
    group = [
        projection(24, 40, 4, dtype=dtype, bias=True, scaling=0.5, dropout=p),
        projection(24, 16, 3, 20, dtype=dtype, scaling=torch.tensor(2.0), dropout=p, with_bias=True),
        projection(24, 12, dtype=dtype),
    ]
    check_group(torch.randn(2, 19, 24).to(dtype).requires_grad_(), group, SAME[dtype], backend="triton")


@pytest.mark.parametrize("dtypes", [Dtypes(F16, F32, F16), Dtypes(F16, F16, F32), Dtypes(F32, F16, F32)], ids=str)
@drops_or_not
def test_mixed_dtypes(dtypes: Dtypes, p: float) -> None:
    x_dtype = F32 if dtypes.out == F32 else dtypes.compute
    group = [projection(24, 40, 4, dtype=dtypes.compute, lora_dtype=F32, bias=True, dropout=p) for _ in range(2)]
    check_group(torch.randn(21, 24).to(x_dtype).requires_grad_(), group, dtypes, backend="triton")


def test_some_adapters_drop_and_some_do_not() -> None:
    adapters = (adapter(4, 24, 16, dropout=0.5), adapter(3, 24, 16), adapter(2, 24, 16, dropout=0.1))
    group = [LoraProjection(DenseWeight(torch.randn(16, 24)), None, adapters), projection(24, 8, 5)]
    check_group(torch.randn(9, 24).requires_grad_(), group, SAME[F32], backend="triton")


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 1), (1, 33), (2, 3, 4)], ids=str)
def test_small_and_empty_inputs(shape: tuple[int, ...]) -> None:
    """On small whole numbers nothing is rounded: the library's results, bit for bit."""

    def whole(*size: int) -> Tensor:
        return torch.randint(-3, 4, size).float()

    features = shape[-1]
    group = []
    for out, rank, p in ((5, 2, 0.5), (1, 1, 0.0)):
        a, b = whole(rank, features).requires_grad_(), whole(out, rank).requires_grad_()
        group.append(LoraProjection(DenseWeight(whole(out, features)), whole(out), (LoraAdapter(a, b, 2.0, None, p),)))
    x = whole(*shape).requires_grad_()
    dys = [whole(*shape[:-1], p.weight.shape[0]) for p in group]
    results = []
    for backend in ("triton", "library"):
        ys = lora_linear_group(x, group, seeds=seeds_for(group), backend=backend)
        results.append([*ys, *torch.autograd.grad(ys, [x, *parameters(group)], dys)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_inputs_and_weights_of_any_layout() -> None:
    turned = LoraProjection(DenseWeight(torch.randn(12, 8).t()), None, (adapter(2, 12, 8),))
    sliced = LoraProjection(DenseWeight(torch.randn(6, 24)[:, ::2]), None, (adapter(2, 12, 6, dropout=0.5),))
    for x in (torch.randn(12, 5).t(), torch.randn(4, 3, 24)[..., ::2], torch.randn(12).expand(6, 12)):
        check_group(x.detach().requires_grad_(), [turned, sliced], SAME[F32], backend="triton")


@pytest.mark.parametrize("trained", ("a", "b", "bias", "x"))
def test_frozen_and_trained_in_every_mix(trained: str) -> None:
    group = [projection(8, 6, 2, bias=True, with_bias=True), projection(8, 4, 3, 20)]
    for p in group:
        for i, t in enumerate(p.tensors()):
            if t is not None:
                t.requires_grad_(("a", "b", "bias")[(i - 1) % 3] == trained)
    check_group(torch.randn(7, 8).requires_grad_(trained == "x"), group, SAME[F32], backend="triton")


def test_expanded_and_missing_output_gradients() -> None:
    group = [projection(12, 8, 2), projection(12, 6, 3, dropout=0.5), projection(12, 4)]
    x = torch.randn(7, 12, requires_grad=True)
    for used in ((0, 1, 2), (1,), (2,), (0, 2)):
        grads = []
        for backend in ("triton", "library"):
            ys = lora_linear_group(x, group, seeds=seeds_for(group), backend=backend)
            total = sum(ys[i].sum() for i in used)
            grads.append(torch.autograd.grad(total, [x, *parameters(group)], allow_unused=True))
        for ours, theirs in zip(*grads, strict=True):
            if ours is None or theirs is None:  # the library may give zeros where nothing flows
                assert all(g is None or not g.any() for g in (ours, theirs))
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class OwnProduct(DenseWeight):
    """A base with products of its own, as LLM.int8 has."""

    kind = "own_product_of_a_test"

    def linear(self, x: Tensor, shared: Any = None) -> Tensor:
        return x @ self.weight.to(x.dtype).t()

    def linear_t(self, dy: Tensor) -> Tensor:
        return dy @ self.weight.to(dy.dtype)


@drops_or_not
def test_a_base_with_products_of_its_own(p: float) -> None:
    own = LoraProjection(OwnProduct(torch.randn(16, 24)), torch.randn(16), (adapter(4, 24, 16, dropout=p),))
    bare = LoraProjection(OwnProduct(torch.randn(8, 24)), torch.randn(8))
    for group in ([own], [own, projection(24, 12, 3)], [projection(24, 12, 3), own, bare]):
        check_group(torch.randn(9, 24).requires_grad_(), group, SAME[F32], backend="triton")
    check_group(torch.randn(9, 24).requires_grad_(), [own], Dtypes(F32, F32, F16), backend="triton")


def test_the_same_result_every_time_and_no_graph_without_grad() -> None:
    group = [projection(24, 40, 20, dropout=0.3), projection(24, 16, 4)]
    x = torch.randn(64, 24, requires_grad=True)
    runs = []
    for _ in range(2):
        ys = lora_linear_group(x, group, seeds=seeds_for(group), backend="triton")
        runs.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), [x, *parameters(group)])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    with torch.no_grad():
        y = lora_linear_group(x, group, seeds=seeds_for(group), backend="triton")[0]
    assert not y.requires_grad and torch.equal(y, runs[0][0])


def test_one_projection() -> None:
    x, w, a, b = torch.randn(3, 7), torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2)
    ours = lora_linear(x, w, a, b, scaling=0.5, backend="triton")
    torch.testing.assert_close(ours, lora_linear(x, w, a, b, scaling=0.5), rtol=1e-5, atol=1e-5)


def test_refuses_what_it_would_compute_wrongly() -> None:
    messages = {torch.bfloat16: "expected fp32 or fp16 in Triton's interpreter", F64: "expected fp16, bf16 or fp32"}
    for dtype, message in messages.items():
        t = torch.randn(4, 4, dtype=dtype)
        with pytest.raises(ValueError, match=f"backend: 'triton' cannot serve this group: {message}"):
            lora_linear(t, t, t, t, backend="triton")
    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match="expected fp16, bf16 or fp32 throughout, got"):
        lora_linear_group(x, [projection(4, 4, 2, lora_dtype=F64)], lora_dtype=F32, backend="triton")


@drops_or_not
@pytest.mark.parametrize("rank", (1, 16, 40))
def test_products_of_rank_width(rank: int, p: float) -> None:
    from fastpeft_kernels.lora import rank_products
    from fastpeft_kernels.lora.projection import Mask

    mask = Mask(SEED, p, 2) if p else None
    y, b, s = matrix(LONG, FEATURES, F16), matrix(FEATURES, rank, F16), matrix(LONG, rank, F16)
    room = torch.full((LONG, rank + 2), torch.nan, dtype=F16)
    ds = room[:, 1:-1]
    check(rank_products.project_down(y, b, None, mask, "triton"), lambda y, b: dropped(y, p, y.dtype) @ b, y, b)
    db = rank_products.both_gradients(y, b, s, ds, F32, backend="triton")
    assert room[:, [0, -1]].isnan().all()
    check(ds, lambda y, b: y @ b, y, b)
    for ours in (db, rank_products.up_gradient(y, s, F32, backend="triton")):
        assert ours.dtype == F32
        check(ours, lambda y, s: y.t() @ s, y.float(), s.float())
    da = rank_products.down_gradient(s, y, F32, mask, "triton")
    check(da, lambda y, s: s.t() @ dropped(y, p, y.dtype), y.float(), s.float())
    for before in (matrix(LONG, FEATURES, F16), matrix(LONG, FEATURES, F32)):
        dx = rank_products.input_gradient(s, b.t(), before.clone(), mask, "triton")
        check(dx, lambda s, b, dx: dx + dropped(s @ b.t(), p, s.dtype).to(dx.dtype), s, b, before)


@drops_or_not
@every_dtype
def test_every_product_of_a_group_is_by_our_kernels(
    dtype: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the library multiplies, nor is there a dropped copy."""

    def never(*args: object, **options: object) -> None:
        raise AssertionError("the library was taken")

    group = [projection(24, 40, 4, 3, dtype=dtype, dropout=p), projection(24, 16, 20, dtype=dtype)]
    x = torch.randn(9, 24).to(dtype).requires_grad_()
    with monkeypatch.context() as patch:
        for name in ("mm", "addmm"):
            patch.setattr(torch, name, never)
        patch.setattr("fastpeft_kernels.lora.rank_products.dropout", never)
        ys = lora_linear_group(x, group, seeds=seeds_for(group), backend="triton")
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert all(t.grad is not None for t in (x, *parameters(group)))
