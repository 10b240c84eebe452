"""How good a classifier is."""

from __future__ import annotations

from typing import Any


def classification_metrics(prediction: Any) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur.

    Args:
        prediction: transformers' EvalPrediction: predictions (rows, classes) of logits, label_ids (rows,).
    """
    import numpy as np

    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    guessed, true = np.argmax(logits, axis=-1), np.asarray(prediction.label_ids)
    return {"accuracy": accuracy(true, guessed), "f1_macro": f1_macro(true, guessed)}


def accuracy(true: Any, guessed: Any) -> float:
    """Share of rows that are right; both are labels, as many, as arrays or lists."""
    import numpy as np

    return float(np.mean(np.asarray(true) == np.asarray(guessed)))


def f1_macro(true: Any, guessed: Any) -> float:
    """F1 averaged over the classes that occur; both are labels, as many, as arrays or lists."""
    import numpy as np

    true, guessed = np.asarray(true), np.asarray(guessed)
    scores = []
    for label in np.union1d(guessed, true):
        right = np.sum((guessed == label) & (true == label))
        scores.append(2 * right / (np.sum(guessed == label) + np.sum(true == label)))
    return float(np.mean(scores))
