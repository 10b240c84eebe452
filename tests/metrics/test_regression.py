"""Predicted numbers: correlations and errors."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from fastpeft.metrics.regression import measure, pearson, regression_metrics, spearman


def test_figures() -> None:
    true, guessed = np.asarray([1.0, 2.0, 3.0, 3.0]), np.asarray([1.0, 2.0, 3.0, 9.0])
    found = regression_metrics(SimpleNamespace(label_ids=true, predictions=guessed[:, None]))
    assert found["mae"] == 1.5
    assert found["spearman"] == pytest.approx(stats.spearmanr(true, guessed).statistic)
    assert found["pearson"] == pytest.approx(stats.pearsonr(true, guessed).statistic)


def test_the_same_for_all_rows_tells_nothing() -> None:
    assert pearson([1.0, 2.0], [3.0, 3.0]) == spearman([2.0, 2.0], [1.0, 3.0]) == 0.0


def test_beside_the_median() -> None:
    rows = [SimpleNamespace(rows={"labels": labels}) for labels in ([0.0, 1.0, 5.0], [1.0, 2.0])]
    error = measure(np.asarray([[1.0], [2.5]]), rows[0], rows[1], ()).metrics[2]  # type: ignore[arg-type]
    assert (error.value, error.baseline, error.better) == (0.25, 0.5, "lower") and error.low <= 0.25 <= error.high
