"""Several classes a row, against scikit-learn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

from fastpeft.data.encoded import Encoded
from fastpeft.metrics.multilabel import counted, measure, multilabel_metrics


def encoded(labels: Any) -> Any:
    return SimpleNamespace(rows={"labels": np.asarray(labels, dtype=float).tolist()})


@pytest.mark.parametrize("seed", range(4))
def test_f1_as_scikit_learn_has_it(seed: int) -> None:
    generator = np.random.default_rng(seed)
    true = generator.random((12, 5)) < [0.1, 0.3, 0.5, 0.9, 0.0]  # the last class does not occur
    logits = generator.normal(size=(12, 5)) - [0, 0, 0, 0, 9]
    found = multilabel_metrics(SimpleNamespace(label_ids=true.astype(np.float32), predictions=logits))
    guessed = logits > 0
    assert found["f1_micro"] == pytest.approx(f1_score(true, guessed, average="micro", zero_division=0))
    assert found["f1_macro"] == pytest.approx(f1_score(true, guessed, average="macro", zero_division=np.nan))


def test_figures_beside_the_best_constant() -> None:
    training: Encoded = encoded([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]])  # a and b are best given to all
    evaluation: Encoded = encoded([[1, 0, 0], [0, 1, 1]])
    logits = np.asarray([[2.0, -1.0, 0.1], [-1.0, 3.0, 1.0]])
    found = measure(logits, training, evaluation, ["a", "b", "c"])
    together, mean = found.metrics
    assert (together.value, together.rows) == (pytest.approx(2 * 3 / (4 + 3)), 2)
    assert together.baseline == pytest.approx(2 * 2 / (4 + 3)) and mean.baseline == pytest.approx((2 / 3 + 2 / 3) / 3)
    assert mean.value == pytest.approx((1 + 1 + 2 / 3) / 3) and not found.notes
    assert "| c | 0.5 | 1 | 0.6667 | 1 |" in found.sections[0].text


def test_no_class_for_any_row_is_noticed() -> None:
    found = measure(np.full((2, 2), -1.0), encoded([[1, 0]]), encoded([[1, 0], [0, 1]]), ["a", "b"])
    assert found.metrics[0].value == 0.0 and "no class has a probability above 0.5 in any row" in found.notes[0]
    assert counted([[0.0, 0.0]], [[False, False]]).sum() == 0
