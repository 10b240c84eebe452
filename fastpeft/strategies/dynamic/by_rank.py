"""How good an adapter is at each of its lower ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpeft.metrics.classification import accuracy
from fastpeft.metrics.findings import Findings, Section
from fastpeft.metrics.intervals import over_rows
from fastpeft.metrics.language import Losses
from fastpeft.training.preparing import Prepared

from .beside import scores_of
from .rank import adapters_of, first_alone, put_back


def by_rank(prepared: Prepared, trainer: Any, ranks: Sequence[int]) -> Findings:
    """The evaluation's loss per token or accuracy with the first ranks of each adapter alone; the model stays.

    Args:
        ranks: that are measured.
    """
    adapters = adapters_of(trainer.model).values()
    lines = []
    for rank in ranks:
        left_out = first_alone(adapters, rank)
        scores = scores_of(prepared, trainer)
        put_back(left_out)
        if scores is None:
            return Findings()
        if isinstance(scores, Losses):
            name, interval = "loss per token", scores.learned().loss()
        else:
            assert prepared.evaluation is not None
            name, interval = "accuracy", over_rows(accuracy, prepared.evaluation.rows["labels"], scores)
        lines.append(f"| {rank} | {interval.value:.4f} | {interval.low:.4f} to {interval.high:.4f} |")
    head = [f"| rank | {name} | 95 % interval over rows |", "|---|---|---|"]
    return Findings((), (), (Section("By rank", "\n".join([*head, *lines])),))
