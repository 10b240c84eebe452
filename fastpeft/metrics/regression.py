"""How good predicted numbers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpeft.data.encoded import Encoded
from fastpeft.metrics.findings import Findings, Metric
from fastpeft.requirements import require

from .intervals import over_rows


def regression_metrics(prediction: Any) -> dict[str, float]:
    """Pearson's and Spearman's correlation and the mean absolute error.

    Args:
        prediction: transformers' EvalPrediction: predictions (rows, 1), label_ids (rows,).
    """
    true, guessed = _flat(prediction.label_ids), _flat(prediction.predictions)
    return {name: of(true, guessed) for name, of in (("pearson", pearson), ("spearman", spearman), ("mae", mae))}


def pearson(true: Any, guessed: Any) -> float:
    """Pearson's correlation; 0 where one of the two is the same in all rows, which tells nothing."""
    import numpy as np

    if np.ptp(true) == 0 or np.ptp(guessed) == 0:
        return 0.0
    return float(np.corrcoef(true, guessed)[0, 1])


def spearman(true: Any, guessed: Any) -> float:
    """Spearman's correlation, Pearson's of the ranks; 0 where one of the two is the same in all rows."""
    rank = require("train", "scipy.stats", "ranks").rankdata
    return pearson(rank(true), rank(guessed))


def mae(true: Any, guessed: Any) -> float:
    """Mean absolute error."""
    import numpy as np

    return float(np.abs(np.asarray(true) - np.asarray(guessed)).mean())


def measure(predictions: Any, training: Encoded, evaluation: Encoded, labels: Sequence[str]) -> Findings:
    """Figures over the evaluation's rows; `predictions` are (rows, 1)."""
    import numpy as np

    true, guessed = _flat(evaluation.rows["labels"]), _flat(predictions)
    rows = len(true)
    median = np.full_like(true, np.median(_flat(training.rows["labels"])))
    metrics = (
        Metric("Pearson's correlation", *over_rows(pearson, true, guessed), rows),
        Metric("Spearman's correlation", *over_rows(spearman, true, guessed), rows),
        Metric(
            "mean absolute error",
            *over_rows(mae, true, guessed),
            rows,
            mae(true, median),
            "the training rows' median",
            better="lower",
        ),
    )
    return Findings(metrics)


def _flat(values: Any) -> Any:
    import numpy as np

    return np.asarray(values, dtype=np.float64).reshape(-1)
