"""Generated answers beside the rows' own."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastpeft.metrics.findings import Findings, Metric
from fastpeft.metrics.generated import chrf, chrf_counts, exact, word_f1
from fastpeft.metrics.intervals import over_rows
from fastpeft.training.evaluating import MOST_NEW_TOKENS, answers, exchange
from fastpeft.training.preparing import Prepared

from .change import change

MOST_ROWS = 20_000
"""Training rows whose answers are counted."""
AGAINST = "the training rows' most frequent answer"


def _mean(values: Any) -> float:
    return float(np.mean(values))


FIGURES = (("exact answers", exact, _mean), ("F1 of words", word_f1, _mean), ("chrF", chrf_counts, chrf))
"""Name, what is kept of a pair of texts, and the figure of all rows."""


class Answers:
    """The rows that are answered, the same each time.

    Args:
        prepared: of a decoder or an encoder-decoder, with rows to evaluate on.
        count: at most so many, drawn by the run's seed; rows whose answer was cut are none of them.

    Attributes:
        prompts: token ids.
        true: the rows' own answers.
        usual: the training rows' most frequent answer.
        new_tokens: that the longest of them has.
    """

    def __init__(self, prepared: Prepared, count: int) -> None:
        assert prepared.evaluation is not None
        task, tokenizer, evaluation = prepared.config.model.task, prepared.tokenizer, prepared.evaluation
        pairs = [
            pair
            for row, was_cut in zip(evaluation.rows, evaluation.were_cut, strict=True)
            if not was_cut and (pair := exchange(row, task)) is not None
        ]
        drawn = sorted(random.Random(prepared.config.training.seed).sample(range(len(pairs)), min(count, len(pairs))))
        self.prompts = [pairs[place].prompt for place in drawn]
        self.true = [_text(tokenizer, pairs[place].answer) for place in drawn]
        trained: Counter[tuple[int, ...]] = Counter()
        if self.prompts:
            for row in prepared.rows.rows.select(range(min(MOST_ROWS, len(prepared.rows)))):
                if (pair := exchange(row, task)) is not None:
                    trained[tuple(pair.answer)] += 1
        self.usual = _text(tokenizer, trained.most_common(1)[0][0]) if trained else ""
        self.new_tokens = min(max(map(len, trained), default=1), MOST_NEW_TOKENS)

    def measure(self, prepared: Prepared, trainer: Any) -> list[str]:
        """What the model answers."""
        return answers(prepared, trainer, self.prompts, self.new_tokens)

    def findings(self, guessed: Sequence[str], before: Sequence[str] | None) -> Findings:
        """Beside always giving the training rows' most frequent answer."""
        metrics = []
        now, usual = self.kept(guessed), self.kept([self.usual] * len(guessed))
        old = None if before is None else self.kept(before)
        for name, _, figure in FIGURES:
            metrics.append(Metric(name, *over_rows(figure, now[name]), len(guessed), figure(usual[name]), AGAINST))
            if old is not None:
                metrics.append(change(name, figure, (old[name],), (now[name],)))
        return Findings(tuple(metrics), _collapsed(guessed, self.true))

    def kept(self, guessed: Sequence[str]) -> dict[str, Any]:
        """By name of FIGURES, what is kept of each answer, rows first."""
        pairs = list(zip(guessed, self.true, strict=True))
        return {name: np.asarray([kept(*pair) for pair in pairs]) for name, kept, _ in FIGURES}


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.strip()


def _collapsed(guessed: Sequence[str], true: Sequence[str]) -> tuple[str, ...]:
    """A warning where one answer is all that is ever given, though the rows have more."""
    if len(set(guessed)) > 1 or len(set(true)) == 1:
        return ()
    return (
        f"the model answers {guessed[0][:60]!r} to every prompt of the evaluation: it has not learned to tell them "
        "apart; a lower training.learning_rate, more steps, or other lora.target_modules may help",
    )
