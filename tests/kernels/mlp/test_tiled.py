"""The MLP over tiles of tokens: the same numbers as the whole, and nothing in memory that is wider than a tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpeft.memory.trace.live import LiveBytes
from fastpeft_kernels.activation import KINDS
from fastpeft_kernels.common.random import dropout_bits, seeds_from
from fastpeft_kernels.lora import Dtypes, LoraProjection
from fastpeft_kernels.lora.api import draw_seeds
from fastpeft_kernels.mlp import Mlp, lora_mlp
from fastpeft_kernels.mlp.api import run_mlp
from fastpeft_kernels.quant import encode_4bit
from fastpeft_kernels.weights import DecodedOnce, DenseWeight, FourBitWeight, unflatten_weight
from tests.budget import assert_within_budget
from tests.kernels.compiling import BF16, F32, F32_ON_BF16
from tests.kernels.lora.drawn import MANY_TOKENS
from tests.kernels.lora.groups import parameters
from tests.kernels.lora.test_counts import products
from tests.kernels.mlp.mlps import LAYOUTS, check_mlp, mixed, mlp, seeds_of, tiled_by, wide
from tests.kernels.mlp.test_properties import DTYPES, Drawn, check_in_fp64, check_within_budget, mlps

pytestmark = pytest.mark.usefixtures("nan_filled")
SAME = F32
FULL = pytest.mark.full
TILES = st.one_of(st.integers(1, 5), st.integers(1, 80))


def drawn_in_tiles(tile: int, check: Callable[[], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.kernels.mlp.test_properties.lora_mlp", tiled_by(tile))
        check()


@settings(max_examples=15)
@given(case=mlps(), tile=TILES)
def test_in_fp64(case: Drawn, tile: int) -> None:
    drawn_in_tiles(tile, lambda: check_in_fp64(case))


@settings(max_examples=6)
@given(case=mlps(12, MANY_TOKENS), tile=TILES, dtypes=st.sampled_from(DTYPES))
def test_within_the_budget(case: Drawn, tile: int, dtypes: Dtypes) -> None:
    drawn_in_tiles(tile, lambda: check_within_budget(case, dtypes))


@FULL
@settings(max_examples=1000)
@given(case=mlps(), tile=TILES)
def test_many_in_fp64(case: Drawn, tile: int) -> None:
    drawn_in_tiles(tile, lambda: check_in_fp64(case))


@FULL
@settings(max_examples=100)
@given(case=mlps(12, MANY_TOKENS), tile=TILES, dtypes=st.sampled_from(DTYPES))
def test_many_within_the_budget(case: Drawn, tile: int, dtypes: Dtypes) -> None:
    drawn_in_tiles(tile, lambda: check_within_budget(case, dtypes, repeats=20))


COMBINATIONS = [pytest.param(layout, same, marks=FULL) for layout in LAYOUTS for same in DTYPES]


@pytest.mark.parametrize("tile", [24, 128, 300])
@pytest.mark.parametrize(("layout", "dtypes"), [("gate and up", BF16), ("both in one", F32_ON_BF16), *COMBINATIONS])
def test_biases_and_dropout(layout: str, dtypes: Dtypes, tile: int) -> None:
    """Adapters in the dtype of the base as well: their gradients are summed in fp32 all the same."""
    named = {"dtype": dtypes.compute, "bias": True, "dropout": 0.25, "with_bias": True, "between": 0.4}
    m = mlp(layout, 32, 48, ranks=((4,), (3, 2), (5,)), lora_dtype=dtypes.lora, **named)
    check_mlp(torch.randn(16, 16, 32).to(dtypes.compute).requires_grad_(), m, dtypes, keep="input", tile=tile)


@pytest.mark.parametrize("activation", KINDS)
def test_every_activation(activation: str) -> None:
    check_mlp(
        torch.randn(11, 16).requires_grad_(),
        mlp("gate and up", 16, 24, activation=activation),
        SAME,
        keep="input",
        tile=4,
    )


def test_gradients_in_16_bits_are_summed_in_32() -> None:
    """As many tiles as tokens: sums in bf16 would be wrong by far more than the last rounding."""
    m = mlp("up alone", 16, 16, dtype=torch.bfloat16)
    m64 = wide(m)
    x = torch.randn(2048, 16).abs().to(torch.bfloat16)
    ones, wanted = torch.ones(2048, 16, dtype=torch.bfloat16), parameters(list(m.projections))
    found = [torch.autograd.grad(each(x, m), wanted, ones) for each in (tiled_by(8), tiled_by(2048))]
    exact = torch.autograd.grad(tiled_by(2048)(x.double(), m64), parameters(list(m64.projections)), ones.double())
    for tiled, whole, truth in zip(*found, exact, strict=True):
        assert_within_budget(tiled, whole, truth)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_the_same_bits_where_products_round_alike(p: float) -> None:
    """Of products over numbers that need no rounding all results are; also what dropout leaves."""
    m = mlp("gate and up", 16, 24, activation="relu", dropout=p, bias=True, between=p)
    for q in m.projections:
        for t in (q.weight.weight, *[t for t in q.tensors() if t is not None]):  # type: ignore[attr-defined]
            t.data = torch.randint(-1, 2, t.shape).float()
    x = torch.randint(-1, 2, (37, 16)).float().requires_grad_()
    seeds, wanted = seeds_of(m), [x, *parameters(list(m.projections))]
    results = [each(x, m, seeds=seeds) for each in (tiled_by(5), tiled_by(37), lora_mlp)]
    dy = torch.randint(-1, 2, results[0].shape).float()
    found = [[y, *torch.autograd.grad(y, wanted, dy)] for y in results]
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@given(seed=st.integers(-(2**63), 2**63 - 1), first=st.integers(0, 2**32 - 8), stream=st.integers(0, 9))
def test_seeds_for_rows_further_on(seed: int, first: int, stream: int) -> None:
    given_seed = torch.tensor([seed])
    moved = seeds_from(given_seed, torch.tensor([0, first]))
    assert torch.equal(moved[0], given_seed) and moved.stride() == (2, 1)
    expected = dropout_bits(given_seed, first, 7, 5, stream)
    assert torch.equal(dropout_bits(moved[1], 0, 7, 5, stream), expected)


def test_no_tokens() -> None:
    m = mlp("gate and up", 8, 12)
    x = torch.randn(0, 8, requires_grad=True)
    y, wanted = tiled_by(4)(x, m), [x, *parameters(list(m.projections))]
    grads = torch.autograd.grad(y.sum(), wanted)
    assert y.shape == (0, 8) and all(not grad.any() for grad in grads)


def four_bit(m: Mlp) -> Mlp:
    def quantised(p: LoraProjection) -> LoraProjection:
        return LoraProjection(FourBitWeight(encode_4bit(p.weight.decode(), nested=True)), p.bias, p.adapters)

    return Mlp(tuple(map(quantised, m.inner)), quantised(m.down), m.activation)


def test_weights_are_decoded_once_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    decode = FourBitWeight.decode
    monkeypatch.setattr(FourBitWeight, "decode", lambda self, *a, **k: made.append(self.shape) or decode(self, *a, **k))
    m = four_bit(mlp("gate and up", 64, 96))
    y = tiled_by(4)(torch.randn(21, 64, requires_grad=True), m)
    assert len(made) == 3
    y.sum().backward()
    assert len(made) == 6


def test_a_weight_that_is_decoded_once_passes_for_its_base() -> None:
    base = DenseWeight(torch.randn(6, 4, dtype=torch.float64))
    once = DecodedOnce(base)
    tensors, meta = once.flatten()
    assert torch.equal(unflatten_weight(once.kind, tensors, meta).decode(), base.decode())
    assert once.stamp() == base.stamp() and once.storage == base.storage
    assert once.ready(torch.float32) is once.ready(torch.float32)
    assert not once.is_ready(torch.float32) and once.is_ready(torch.float64)


def test_only_the_input_is_kept_and_recomputation_makes_no_product() -> None:
    m = mlp("gate and up", 8, 12, dropout=0.25)
    x = torch.randn(21, 8, requires_grad=True)
    wanted, seeds, kept = [x, *parameters(list(m.projections))], seeds_of(m), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = tiled_by(4)(x, m, seeds=seeds)
    assert set(kept) <= {t.data_ptr() for t in wanted}

    def step(function: Callable[..., Tensor]) -> Any:
        return torch.autograd.grad(function(), wanted, torch.ones_like(x))

    plain, expected = products(lambda: step(lambda: tiled_by(4)(x, m, seeds=seeds)))
    run = tiled_by(4)
    again, found = products(lambda: step(lambda: checkpoint(run, x, m, seeds=seeds, use_reentrant=False)))
    assert again == plain and all(map(torch.equal, found, expected))
    assert y.shape == x.shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_of_all_tokens_is_as_wide_as_the_mlp(layout: str) -> None:
    """Largest new storage, and the peak, over input, result and gradients: by the tile, not by the tokens."""
    tokens, size, features, tile = 1024, 16, 256, 32
    m = four_bit(mlp(layout, size, features, dropout=0.25))
    peaks = {}
    for rows in (0, tile):
        x, dy = torch.randn(tokens, size, requires_grad=True), torch.randn(tokens, size)
        live = LiveBytes("cpu")
        live.add([x, dy, *parameters(list(m.projections))])
        before = live.live
        with live:
            (tiled_by(rows) if rows else lora_mlp)(x, m, keep="input").backward(dy)
        peaks[rows] = live.peak - before
    weights = 4 * sum(q.weight.shape[0] * q.weight.shape[1] for q in m.projections)
    assert peaks[0] > 3 * 4 * tokens * features
    assert peaks[tile] < 2 * 4 * tokens * size + 2 * weights + 8 * 4 * tile * 2 * features
    assert peaks[tile] < 4 * tokens * features


@pytest.mark.parametrize("grad", [True, False])
def test_the_result_may_be_written_into(grad: bool) -> None:
    m, x = mlp("gate and up", 8, 12), torch.randn(2, 5, 8, requires_grad=True)
    with torch.set_grad_enabled(grad):
        expected = lora_mlp(x, m) + x
        y = tiled_by(4)(x, m)
        y += x
    torch.testing.assert_close(y, expected)


def test_a_base_that_changed_is_refused() -> None:
    m = mlp("gate and up", 8, 12)
    y = tiled_by(2)(torch.randn(3, 8), m)
    m.down.weight.weight.add_(1)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="changed or moved between forward and backward"):
        y.sum().backward()


def test_the_host_reads_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is none to read: what a CUDA graph records must not depend on one."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no meta device
    with torch.device("meta"):
        m = mlp("gate and up", 32, 48, bias=True, dropout=0.25, scaling=torch.tensor(0.5))
        x = torch.randn(4, 16, 32, requires_grad=True)
        y = run_mlp(x, m, SAME, draw_seeds(x.device, m.projections, training=True), tile=24)
        y.sum().backward()
    assert y.is_meta and all(t.grad is not None for t in (x, *parameters(list(m.projections))))


def test_bad_arguments_name_what_is_wrong() -> None:
    x, m = torch.randn(3, 8), mlp("gate and up", 8, 12)
    for tile in (-1, 2.0, True):
        with pytest.raises(ValueError, match=f"tile: expected 0 or more tokens, got {tile}"):
            lora_mlp(x, m, keep="input", tile=tile)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tile: expected 0 with keep='preactivations', which keeps gate and up"):
        lora_mlp(x, m, tile=4)
    with pytest.raises(ValueError, match="tile: expected 0 for rows with adapters of their own, got 4"):
        lora_mlp(torch.randn(2, 3, 8), mixed(m, (0, 1)), keep="input", tile=4)
    m.down.weight.row_by_row = False
    with pytest.raises(ValueError, match="tile: expected 0 for weights whose product looks at all tokens at once"):
        tiled_by(4)(x, m)
