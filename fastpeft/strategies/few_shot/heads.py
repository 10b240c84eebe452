"""What makes classes of embeddings: logistic regression, or the nearest mean of a class; both are linear."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpeft.requirements import require

SETTINGS, WEIGHTS = "few_shot.json", "few_shot.safetensors"
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LinearHead:
    """Scores of classes: embeddings @ weight.T + bias.

    Attributes:
        weight: (classes, width).
        bias: (classes,).
    """

    weight: Floats
    bias: Floats

    def scores(self, embeddings: Any) -> Floats:
        """(rows, classes); their softmax are the probabilities."""
        found: Floats = np.asarray(embeddings, dtype=np.float32) @ self.weight.T + self.bias
        return found

    def save(self, folder: Path) -> None:
        from safetensors.numpy import save_file

        save_file({"weight": np.ascontiguousarray(self.weight), "bias": self.bias}, folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> LinearHead:
        """What `save` wrote. Raises ValueError for anything else, OSError where there is nothing."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            found = load_file(folder / WEIGHTS)
        except (SafetensorError, KeyError, TypeError, AttributeError) as error:  # the rest: NumPy lacks the dtype
            raise ValueError(str(error)) from error
        shapes = {name: value.shape for name, value in found.items()}
        weight, bias = (shapes.get(name, ()) for name in ("weight", "bias"))
        if len(shapes) != 2 or len(weight) != 2 or bias != weight[:1]:
            raise ValueError(f"expected weight (classes, width) and bias (classes,), got {shapes}")
        return cls(**{name: value.astype(np.float32) for name, value in found.items()})


def logistic_regression(embeddings: Any, labels: Any) -> LinearHead:
    """scikit-learn's, with its default penalty, as SetFit's head is.

    Args:
        embeddings: (rows, width).
        labels: (rows,) numbers of classes from 0 on, each at least once.
    """
    linear = require("train", "sklearn.linear_model", "the head on the embeddings")
    fitted = linear.LogisticRegression(max_iter=1000).fit(embeddings, labels)
    weight, bias = fitted.coef_.astype(np.float32), fitted.intercept_.astype(np.float32)
    if len(weight) == 1:  # of two classes it keeps the second's against the first
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return LinearHead(weight, bias)


def centroids(embeddings: Any, labels: Any) -> LinearHead:
    """The class whose mean is nearest (Snell et al. 2017): -|x - c|² is 2 x·c - |c|² and what all classes share."""
    embeddings, labels = np.asarray(embeddings, dtype=np.float32), np.asarray(labels)
    means = np.stack([embeddings[labels == label].mean(0) for label in range(labels.max() + 1)])
    return LinearHead(2 * means, -(means**2).sum(-1))


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What `write_settings` wrote; None where a folder is of no few-shot run. Raises ValueError for anything else."""
    path = folder / SETTINGS
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(str(error)) from error
    expected: dict[str, type] = {"kind": str, "labels": list}
    if isinstance(found, dict) and found.get("kind") == "worded":
        expected |= {"words": list, "pattern": str, "whole": bool, "calibrate": bool}
    for name, kind in expected.items():
        value = found.get(name) if isinstance(found, dict) else None
        names = value if isinstance(value, list) else []
        if not isinstance(value, kind) or not all(isinstance(one, str) for one in names):
            raise ValueError(f"expected {name} as a {kind.__name__}{' of names' * (kind is list)}, got {value!r}")
    if found["kind"] not in ("embedded", "worded"):
        raise ValueError(f"expected kind embedded or worded, got {found['kind']!r}")
    if len(found["labels"]) < 2 or len(found.get("words", found["labels"])) != len(found["labels"]):
        raise ValueError(f"expected two classes or more, each with its word, got {found['labels']}")
    return found
