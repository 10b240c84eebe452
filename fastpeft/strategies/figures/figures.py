"""The figures of a run's task, before training and after."""

from __future__ import annotations

from typing import Any

from fastpeft.training.findings import Findings
from fastpeft.training.preparing import Prepared

from . import classes, tokens
from .answers import Answers


class Figures:
    """Classes for classifiers; losses of tokens, and answers where there are prompts, for language models.

    Args:
        prepared: with rows to evaluate on.
        generate: how many prompts are answered at most.
    """

    def __init__(self, prepared: Prepared, generate: int) -> None:
        task = prepared.config.model.task
        self._by_class = task == "sequence-classification"
        found = Answers(prepared, generate) if generate and task in ("causal-lm", "seq2seq-lm") else None
        self._answers = found if found is not None and found.prompts else None
        self._before: tuple[Any, Any] = (None, None)

    def measure_before(self, prepared: Prepared, trainer: Any) -> None:
        """What `findings` compares with; the model is as loaded."""
        self._before = self._measured(prepared, trainer)

    def findings(self, prepared: Prepared, trainer: Any) -> Findings:
        """With the trained model."""
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
