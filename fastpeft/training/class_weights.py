"""A classifier's loss in which classes have weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from fastpeft.errors import UserError
from fastpeft.hints import did_you_mean


def check_weights(weights: dict[str, float], labels: Sequence[str]) -> None:
    """Raise UserError for a weight that is not above 0, or of no class."""
    for label, weight in weights.items():
        if label not in labels:
            hint = did_you_mean(label, labels)
            raise UserError(
                f"strategy.options.class_weights: expected classes of {', '.join(labels)}, got {label!r}{hint}"
            )
        if not 0 < weight < math.inf:
            raise UserError(f"strategy.options.class_weights.{label}: expected a number above 0, got {weight}")


def weights_of(
    wanted: Literal["balanced"] | dict[str, float], labels: Sequence[str], classes: Sequence[int]
) -> list[float]:
    """One weight a class, in the order of `labels`.

    Args:
        wanted: "balanced" gives each class the same sum of weights, rows / (classes * rows of the class), as
            scikit-learn has it; otherwise weights by label, 1 for those left out.
        classes: of the training rows; a class without rows has weight 1.
    """
    if wanted != "balanced":
        return [wanted.get(label, 1.0) for label in labels]
    counts = [0] * len(labels)
    for number in classes:
        counts[number] += 1
    there = sum(count > 0 for count in counts)
    return [len(classes) / (there * count) if count else 1.0 for count in counts]


def weighted_loss(weights: Sequence[float], smoothing: float = 0.0) -> Callable[..., Any]:
    """A `compute_loss_func` of transformers' Trainer: torch's cross entropy with weights, a batch's weighted mean.

    Where several batches make a step, each counts by its rows.

    Args:
        weights: one a class.
        smoothing: label smoothing, which is weighted too.
    """
    import torch

    of_class = torch.tensor(weights)

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        logits = outputs.logits.float()
        mean = torch.nn.functional.cross_entropy(
            logits, labels, weight=of_class.to(logits.device), label_smoothing=smoothing
        )
        return mean if num_items_in_batch is None else mean * len(labels) / num_items_in_batch

    return loss
