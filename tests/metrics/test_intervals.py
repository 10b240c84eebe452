"""Intervals against what scipy's tables and simulation say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastpeft.metrics.classification import accuracy
from fastpeft.metrics.intervals import over_rows, over_seeds


@pytest.mark.parametrize(("count", "t"), [(2, 12.706), (3, 4.303), (10, 2.262), (11, 2.228), (31, 2.042), (121, 1.980)])
def test_students_t(count: int, t: float) -> None:
    values = [0.0, 1.0] * (count // 2) + [0.5] * (count % 2)
    found = over_seeds(values)
    half = t * np.std(values, ddof=1) / math.sqrt(count)
    assert found.value == pytest.approx(0.5)
    assert found.high - found.value == pytest.approx(half, rel=1e-3)
    assert found.low == pytest.approx(1 - found.high)


def test_one_seed_says_nothing_of_others() -> None:
    assert over_seeds([0.7]) == (0.7, -math.inf, math.inf)


def test_the_bootstrap_covers_the_truth() -> None:
    """Of 200 evaluations of a model that is right 70 % of the time, nearly 95 % have 0.7 in their interval."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        right = generator.random(200) < 0.7
        low, high = over_rows(accuracy, np.ones(200), right, resamples=200, seed=seed)[1:]
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 198


@pytest.mark.parametrize("columns", [([],), ([1, 2], [1])])
def test_wrong_columns(columns: tuple[list[int], ...]) -> None:
    with pytest.raises(ValueError, match="columns: expected the same number of rows in each, at least one"):
        over_rows(lambda *each: 0.0, *columns)


def test_no_seeds() -> None:
    with pytest.raises(ValueError, match="values: expected at least one"):
        over_seeds([])
