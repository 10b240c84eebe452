"""Counter-based dropout: the statistics of its bits, and what a mask does to values and gradients.

Inputs are fresh in every run. A bound of 6 standard deviations fails by chance about once in 500 million comparisons.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastpeft_kernels.common.random import CounterDropout, draw_seed, dropout, dropout_bits, keep_threshold

SIGMAS = 6.0
ROWS, COLUMNS = 256, 1024
PROBABILITIES = (0.05, 0.1, 0.5, 0.9)


def fresh_seed() -> Tensor:
    return draw_seed(torch.device("cpu"))


def keep(seed: Tensor, p: float = 0.5, stream: int = 0) -> Tensor:
    return dropout_bits(seed, 0, ROWS, COLUMNS, stream) >= keep_threshold(p)


def assert_share(hits: Tensor, expected: float, what: str) -> None:
    """The share of True is `expected`, as of independent draws."""
    deviation = math.sqrt(expected * (1 - expected) / hits.numel())
    distance = (hits.double().mean().item() - expected) / deviation
    assert abs(distance) < SIGMAS, f"{what}: {distance:+.1f} standard deviations from {expected}"


def assert_independent(a: Tensor, b: Tensor, p: float, what: str) -> None:
    """Two masks, each keeping with 1 - p, agree as often as independent ones do."""
    assert_share(a == b, p * p + (1 - p) * (1 - p), what)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_keeps_the_stated_share(p: float) -> None:
    for stream in range(4):
        assert_share(keep(fresh_seed(), p, stream), 1 - p, f"stream {stream}")


def test_every_bit_is_balanced() -> None:
    bits = dropout_bits(fresh_seed(), 0, ROWS, COLUMNS)
    for i in range(32):
        assert_share((bits >> i) & 1 == 1, 0.5, f"bit {i}")


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("distance", (1, 2, 16, 128))
def test_neighbours_in_rows_and_columns_are_independent(p: float, distance: int) -> None:
    mask = keep(fresh_seed(), p)
    assert_independent(mask[distance:], mask[:-distance], p, "rows")
    assert_independent(mask[:, distance:], mask[:, :-distance], p, "columns")
    assert_independent(mask[distance:, distance:], mask[:-distance, :-distance], p, "diagonals")


@pytest.mark.parametrize("p", PROBABILITIES)
def test_streams_and_seeds_are_independent(p: float) -> None:
    seed = fresh_seed()
    mask = keep(seed, p)
    for step in (1, 2, 7):
        assert_independent(mask, keep(seed, p, step), p, f"stream {step}")
        assert_independent(mask, keep(seed + step, p), p, f"seed + {step}")
        assert_independent(mask, keep(seed + (step << 32), p), p, f"seed + {step} * 2**32")
        # What one step of the stream does to the keys of a row, a step of the row must not repeat.
        assert_independent(mask[step:], keep(seed, p, step)[:-step], p, f"row and stream, {step}")


def test_counts_per_row_and_column_scatter_as_they_should() -> None:
    """The mean of a chi-squared statistic over rows (columns) is its number of degrees of freedom."""
    mask = keep(fresh_seed(), 0.1).double()
    for dim in (0, 1):
        n, lines = mask.shape[dim], mask.shape[1 - dim]
        squares = (mask.sum(dim) - 0.9 * n) ** 2 / (0.09 * n)
        assert abs(squares.sum().item() - lines) < SIGMAS * math.sqrt(2 * lines)


def test_rows_beyond_32_bits_differ() -> None:
    seed = fresh_seed()
    low = dropout_bits(seed, 5, 64, 64)
    for first in (2**31 + 5, 2**32 + 5, 2**40 + 5):
        far = dropout_bits(seed, first, 64, 64)
        assert_share((low >= 0) == (far >= 0), 0.5, f"row {first}")


@pytest.mark.parametrize(("first", "rows"), [(0, 1), (3, 5), (31, 9), (39, 1)])
def test_a_block_of_rows_is_the_slice_of_the_whole(first: int, rows: int) -> None:
    seed = fresh_seed()
    whole = dropout_bits(seed, 0, 40, 33, stream=3)
    assert torch.equal(dropout_bits(seed, first, rows, 33, stream=3), whole[first : first + rows])
    assert torch.equal(dropout_bits(seed, first, rows, 7, stream=3), whole[first : first + rows, :7])


def test_streams_and_first_columns_at_once() -> None:
    seed, streams = fresh_seed(), torch.tensor([[0, 7], [3, 2**20]])
    together = dropout_bits(seed, 4, 6, 10, streams, first_column=5)
    for at in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert torch.equal(together[at], dropout_bits(seed, 4, 6, 15, int(streams[at]))[:, 5:])


def test_a_mask_is_a_function_of_its_arguments() -> None:
    seed, x = fresh_seed(), torch.randn(19, 45)
    y = dropout(x, seed, 0.3, stream=1)
    assert torch.equal(y, dropout(x, seed.clone(), 0.3, stream=1))
    kept = dropout_bits(seed, 0, 19, 45, stream=1) >= keep_threshold(0.3)
    assert torch.equal(y, torch.where(kept, x * (1 / 0.7), 0.0))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    seed, x = fresh_seed(), torch.randn(24, 40).to(dtype)
    want = dropout(x, seed, 0.5)
    assert want.dtype == dtype
    strided = torch.empty(24, 80, dtype=dtype)[:, ::2].copy_(x)
    assert torch.equal(dropout(strided, seed, 0.5), want)
    assert torch.equal(dropout(x.t().contiguous().t(), seed, 0.5), want)
    for shape in ((0, 8), (8, 0), (1, 1)):
        assert dropout(torch.ones(shape, dtype=dtype), seed, 0.5).shape == shape


def test_without_dropout_the_result_is_a_copy() -> None:
    x = torch.randn(5, 7)
    y = dropout(x, fresh_seed(), 0.0)
    assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("p", (-0.1, 1.0, 1.5, float("nan")))
def test_probability_outside_its_range(p: float) -> None:
    with pytest.raises(ValueError, match=r"p: expected a dropout probability in \[0, 1\), got"):
        dropout(torch.ones(2, 2), fresh_seed(), p)


def test_nothing_survives_a_drop() -> None:
    seed = fresh_seed()
    kept = dropout_bits(seed, 0, 64, 64) >= keep_threshold(0.5)
    for value in (math.inf, -math.inf, math.nan):
        y = dropout(torch.full((64, 64), value), seed, 0.5)
        assert (y[~kept] == 0.0).all()
        assert torch.equal(y[kept].isfinite(), torch.zeros_like(y[kept], dtype=torch.bool))


def test_the_gradient_has_the_same_mask() -> None:
    seed, x = fresh_seed(), torch.randn(33, 21, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(33, 21, dtype=torch.float64)
    (dx,) = torch.autograd.grad(CounterDropout.apply(x, seed, 0.4, 2), x, dy)
    assert torch.equal(dx, dropout(dy, seed, 0.4, 2))
    small = x[:5, :5].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: CounterDropout.apply(t, seed, 0.4, 2), (small,))
