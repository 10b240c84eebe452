"""How good a classifier is that gives a text any number of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpeft.data.encoded import Encoded
from fastpeft.metrics.findings import Findings, Metric

from .counts import by_class, f1_mean, f1_micro
from .intervals import over_rows

THRESHOLD = 0.5
"""A class whose probability is above it is given; so its logit is above 0."""
AGAINST = "the same classes for every row, those best for the training rows"


def multilabel_metrics(prediction: Any) -> dict[str, float]:
    """F1 over all classes together, and its mean over the classes that occur.

    Args:
        prediction: transformers' EvalPrediction: predictions (rows, classes) of logits, label_ids of 0.0 and 1.0.
    """
    counts = counted(prediction.label_ids, given(prediction.predictions))
    return {"f1_micro": f1_micro(counts), "f1_macro": f1_mean(counts)}


def given(logits: Any) -> Any:
    """Whether each class is given, (rows, classes)."""
    import numpy as np

    return np.asarray(logits) > 0


def counted(true: Any, guessed: Any) -> Any:
    """(rows, classes, 3) of two (rows, classes); see metrics.counts."""
    import numpy as np

    true, guessed = np.asarray(true) > THRESHOLD, np.asarray(guessed)
    return np.stack([true & guessed, guessed, true], axis=-1).astype(np.int32)


def measure(predictions: Any, training: Encoded, evaluation: Encoded, labels: Sequence[str]) -> Findings:
    """Figures over the evaluation's rows; `predictions` are (rows, classes) of logits."""
    import numpy as np

    true, guessed = np.asarray(evaluation.rows["labels"]), given(predictions)
    counts = counted(true, guessed)
    base = counted(true, np.broadcast_to(best_for_all(np.asarray(training.rows["labels"])), true.shape))
    rows = len(true)
    metrics = (
        Metric(
            "F1 of all classes together",
            *over_rows(f1_micro, counts.sum(axis=1)),
            rows,
            f1_micro(base),
            AGAINST,
        ),
        Metric("F1, mean of the classes", *over_rows(f1_mean, counts), rows, f1_mean(base), AGAINST),
    )
    return Findings(metrics, _silent(guessed, true), (by_class("By class", labels, counts),))


def best_for_all(true: Any) -> Any:
    """The classes that, given to every row, have the best F1 together, (classes,): so many of the most frequent."""
    import numpy as np

    order = np.argsort(-true.sum(axis=0), kind="stable")
    sets = [np.isin(np.arange(len(order)), order[:count]) for count in range(1, len(order) + 1)]
    return max(sets, key=lambda one: f1_micro(counted(true, np.broadcast_to(one, true.shape)).sum(axis=0)))


def _silent(guessed: Any, true: Any) -> tuple[str, ...]:
    if guessed.any() or not true.any():
        return ()
    return (
        f"no class has a probability above {THRESHOLD} in any row of the evaluation: more steps or a higher "
        "training.learning_rate may help",
    )
