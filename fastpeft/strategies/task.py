"""Task-adaptive fine-tuning: one labelled task, measured row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from fastpeft.data.encoded import Encoded
from fastpeft.metrics import answers, multilabel, regression, tokens
from fastpeft.metrics.classification import accuracy, f1_macro
from fastpeft.metrics.intervals import over_rows
from fastpeft.training.findings import Findings, Metric
from fastpeft.training.preparing import Prepared

from .base import Strategy

MEASURES: dict[str, Callable[[Any, Encoded, Encoded, Sequence[str]], Findings]] = {
    "token-classification": tokens.measure,
    "question-answering": answers.measure,
    "multi_label_classification": multilabel.measure,
    "regression": regression.measure,
}
"""What is measured on the rows of the evaluation, by data.problem_type or else the task."""


class TaskAdaptive(Strategy):
    """Supervised fine-tuning, as transformers' Trainer and TRL's SFTTrainer do it."""

    name: ClassVar[str] = "task"

    def after(self, prepared: Prepared, trainer: Any) -> Findings:
        config = prepared.config
        kind = config.data.problem_type or config.model.task
        if prepared.evaluation is not None and kind in MEASURES:
            predictions = trainer.predict(prepared.evaluation.rows).predictions
            return MEASURES[kind](predictions, prepared.rows, prepared.evaluation, config.data.labels or ())
        if prepared.evaluation is None or config.model.task != "sequence-classification":
            return Findings()
        import numpy as np

        logits = trainer.predict(prepared.evaluation.rows).predictions
        guessed = np.argmax(logits[0] if isinstance(logits, tuple) else logits, axis=-1)
        true = np.asarray(prepared.evaluation.rows["labels"])
        usual = np.bincount(np.asarray(prepared.rows.rows["labels"])).argmax()
        most = np.full_like(true, usual)
        against = "the training rows' most frequent class"
        metrics = tuple(
            Metric(name, *over_rows(of, true, guessed), len(true), of(true, most), against)
            for name, of in (("accuracy", accuracy), ("F1, mean of the classes", f1_macro))
        )
        return Findings(metrics, _collapsed(guessed, true, prepared.config.data.labels or []))


def _collapsed(guessed: Any, true: Any, labels: list[str]) -> tuple[str, ...]:
    """A warning where one class is all that is ever predicted, though the rows have more."""
    found = {int(label) for label in guessed}
    if len(found) > 1 or len({int(label) for label in true}) == 1:
        return ()
    return (
        f"the model predicts {labels[found.pop()]!r} for every row of the evaluation: it has learned nothing; "
        "a lower training.learning_rate, more steps, or other lora.target_modules may help",
    )
