"""The figures of a run's task, before training and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastpeft.data.encoded import Encoded
from fastpeft.metrics import answers as extracted
from fastpeft.metrics import multilabel, regression
from fastpeft.metrics import tokens as tags
from fastpeft.metrics.findings import Findings
from fastpeft.training.preparing import Prepared

from . import classes, tokens
from .answers import Answers

HEADS: dict[str, Callable[[Any, Encoded, Encoded, Sequence[str]], Findings]] = {
    "token-classification": tags.measure,
    "question-answering": extracted.measure,
    "multi_label_classification": multilabel.measure,
    "regression": regression.measure,
}
"""What is measured of a fresh head, by data.problem_type or else the task; not before training, when it is random."""


class Figures:
    """Classes for classifiers; losses of tokens, and answers where there are prompts, for language models.

    Args:
        prepared: with rows to evaluate on.
        generate: how many prompts are answered at most.
    """

    def __init__(self, prepared: Prepared, generate: int) -> None:
        task = prepared.config.model.task
        self._head = HEADS.get(prepared.config.data.problem_type or task)
        self._by_class = task == "sequence-classification"
        asked = task in ("causal-lm", "seq2seq-lm") and "labels" in prepared.rows.rows.column_names  # else texts alone
        found = Answers(prepared, generate) if generate and asked else None
        self._answers = found if found is not None and found.prompts else None
        self._before: tuple[Any, Any] = (None, None)

    def measure_before(self, prepared: Prepared, trainer: Any) -> None:
        """What `findings` compares with; the model is as loaded."""
        if self._head is None:
            self._before = self._measured(prepared, trainer)

    def findings(self, prepared: Prepared, trainer: Any) -> Findings:
        """With the trained model."""
        if self._head is not None:
            assert prepared.evaluation is not None
            predictions = trainer.predict(prepared.evaluation.rows).predictions
            return self._head(predictions, prepared.rows, prepared.evaluation, prepared.config.data.labels or ())
        scores, answers = self._measured(prepared, trainer)
        before, answers_before = self._before
        if self._by_class:
            return classes.findings(prepared, scores, before)
        found = tokens.findings(prepared, scores, before)
        if self._answers is None:
            return found
        return self._answers.findings(answers, answers_before) + found

    def _measured(self, prepared: Prepared, trainer: Any) -> tuple[Any, Any]:
        if self._by_class:
            return classes.measure(prepared, trainer), None
        answers = None if self._answers is None else self._answers.measure(prepared, trainer)
        return tokens.measure(prepared, trainer), answers
