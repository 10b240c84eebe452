"""What follows from losses row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastpeft.metrics.language import Losses


def of(*sums: float, tokens: int = 10) -> Losses:
    return Losses(np.asarray(sums), np.full(len(sums), tokens), np.zeros(len(sums), int))


def test_perplexity_is_of_tokens_not_of_rows() -> None:
    found = Losses(np.asarray([10.0, 10.0]), np.asarray([10, 30]), np.asarray([10, 0]))
    assert found.loss().value == pytest.approx(0.5) and found.accuracy().value == pytest.approx(0.25)
    assert found.perplexity().value == pytest.approx(math.exp(0.5))
    assert found.perplexity().low == pytest.approx(math.exp(1 / 3))
    assert found.perplexity().high == pytest.approx(math.e)


def test_each_row_is_compared_with_itself() -> None:
    before = of(10, 20, 30, 40, 50)
    change = of(11, 21, 31, 41, 51).since(before)
    assert change == pytest.approx((0.1, 0.1, 0.1))
    assert before.loss().high - before.loss().low > 1  # which another draw of rows would have hidden it in


def test_a_loss_beyond_floats_is_no_error() -> None:
    assert math.isfinite(of(1e6).perplexity().value)


def test_rows_of_which_nothing_is_learned_count_for_nothing() -> None:
    found = Losses(np.asarray([0.0, 10.0]), np.asarray([0, 10]), np.asarray([0, 5])).learned()
    assert len(found) == 1 and found.loss() == pytest.approx((1.0, 1.0, 1.0))
