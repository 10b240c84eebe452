"""What is measured of each task: what is kept of a row, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from fastpeft.data.encoded import Encoded
from fastpeft.data.labels import NUMBERS, SEVERAL, SINGLE
from fastpeft.errors import RunFailed, UserError
from fastpeft.metrics import multilabel, tokens
from fastpeft.metrics.classification import accuracy, f1_macro
from fastpeft.metrics.counts import f1_mean, f1_micro
from fastpeft.metrics.regression import mae, pearson
from fastpeft.strategies.figures.answers import FIGURES as OF_ANSWERS
from fastpeft.strategies.figures.answers import Answers
from fastpeft.training.evaluating import token_losses
from fastpeft.training.preparing import Prepared

from .splits import Splits

Columns = dict[str, Any]
"""By name, what is kept of each row: arrays, rows first."""


@dataclass(frozen=True)
class Figure:
    """Of all rows together.

    Attributes:
        name: as the table has it.
        of: called with `columns`, rows first.
        columns: names of Columns.
        better: which way is better.
        percent: whether it is a share, shown as percent.
    """

    name: str
    of: Callable[..., float]
    columns: tuple[str, ...]
    better: Literal["higher", "lower"] = "higher"
    percent: bool = True

    def value(self, columns: Columns) -> float:
        return self.of(*(np.asarray(columns[name]) for name in self.columns))

    def formatted(self, value: float, sign: str = "") -> str:
        return f"{100 * value:{sign}.1f}" if self.percent else f"{value:{sign}.3f}"

    @property
    def title(self) -> str:
        return f"{self.name}, %" if self.percent else self.name


class Measure:
    """Of one comparison.

    Args:
        prepared: what all trials share; the seed of its configuration draws the rows that are answered.
        splits: of its rows.
        generate: how many prompts of the test rows are answered at most.

    Attributes:
        figures: of the task; the first is what rates are chosen and methods ranked by.
        against: what `baseline` is; empty for nothing.
    """

    figures: tuple[Figure, ...]
    against: ClassVar[str] = ""

    def __init__(self, prepared: Prepared, splits: Splits, generate: int) -> None:
        self._labels = prepared.config.data.labels or []
        self._splits = splits

    @property
    def chief(self) -> Figure:
        return self.figures[0]

    def values(self, columns: Columns) -> dict[str, float]:
        """By name the figures that `columns` are kept for; answers are of test rows alone."""
        return {figure.name: figure.value(columns) for figure in self.figures if figure.columns[0] in columns}

    def columns(self, prepared: Prepared, trainer: Any, tested: bool) -> tuple[Columns, float]:
        """(what is kept of each row, the loss) on the test rows, or those of validation.

        The loss is the mean over rows or tokens; of tags, numbers and several classes with what a method adds to it
        (AdaLoRA does), since it only decides between rates of one method.

        Raises:
            RunFailed: the loss is no number.
        """
        part = self._splits.test if tested else self._splits.validation
        found = trainer.predict(part.rows)
        loss = found.metrics["test_loss"]
        if not np.isfinite(loss):
            raise RunFailed("what it computes is no number")
        predictions = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
        return self._kept(np.asarray(predictions), part), self._loss(np.asarray(predictions), part, float(loss))

    def _kept(self, predictions: Any, part: Encoded) -> Columns:
        raise NotImplementedError

    def _loss(self, predictions: Any, part: Encoded, trained: float) -> float:
        return trained

    def baseline(self) -> float | None:
        """The first figure on the test rows of what has learned nothing of the texts; None for nothing."""
        return None


class OfClasses(Measure):
    figures = (
        Figure("accuracy", accuracy, ("true", "guessed")),
        Figure("macro F1", f1_macro, ("true", "guessed")),
    )
    against = "the most frequent class"

    def _kept(self, predictions: Any, part: Encoded) -> Columns:
        return {"true": np.asarray(part.rows["labels"]), "guessed": predictions.argmax(-1)}

    def _loss(self, predictions: Any, part: Encoded, trained: float) -> float:
        logits, true = predictions.astype(np.float64), np.asarray(part.rows["labels"])
        shifted = logits - logits.max(-1, keepdims=True)
        return float(np.mean(np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(true)), true]))

    def baseline(self) -> float:
        usual = np.bincount(np.asarray(self._splits.train.rows["labels"])).argmax()
        return float(np.mean(np.asarray(self._splits.test.rows["labels"]) == usual))


class OfSeveralClasses(Measure):
    figures = (
        Figure("F1 of all classes together", lambda counts: f1_micro(counts.sum(axis=1)), ("counts",)),
        Figure("F1, mean of the classes", f1_mean, ("counts",)),
    )
    against = "the same classes for every row"

    def _kept(self, predictions: Any, part: Encoded) -> Columns:
        return {"counts": multilabel.counted(part.rows["labels"], multilabel.given(predictions))}

    def baseline(self) -> float:
        true = np.asarray(self._splits.test.rows["labels"])
        best = multilabel.best_for_all(np.asarray(self._splits.train.rows["labels"]))
        return f1_micro(multilabel.counted(true, np.broadcast_to(best, true.shape)))


class OfNumbers(Measure):
    figures = (
        Figure("Pearson's correlation", pearson, ("true", "guessed"), percent=False),
        Figure("mean absolute error", mae, ("true", "guessed"), "lower", percent=False),
    )

    def _kept(self, predictions: Any, part: Encoded) -> Columns:
        return {"true": np.asarray(part.rows["labels"], dtype=np.float64), "guessed": predictions.reshape(-1)}


class OfTags(Measure):
    against = "each word's most frequent tag"

    def __init__(self, prepared: Prepared, splits: Splits, generate: int) -> None:
        super().__init__(prepared, splits, generate)
        entities = Figure("F1 of the entities", lambda counts: f1_micro(counts.sum(axis=1)), ("counts",))
        tags = Figure("F1, mean of the tags", f1_mean, ("counts",))
        words = Figure("accuracy of the words", tokens.accuracy, ("words",))
        self.figures = (entities if tokens.is_iob2(self._labels) else tags, words)

    def _kept(self, predictions: Any, part: Encoded) -> Columns:
        true, guessed = tokens.true_tags(part), tokens.guessed_tags(predictions, part, self._labels)
        return {"counts": tokens.counts(true, guessed, self._labels), "words": tokens.right_words(true, guessed)}

    def baseline(self) -> float:
        true, usual = tokens.true_tags(self._splits.test), tokens.usual_tags(self._splits.train, self._splits.test)
        return self.chief.value({"counts": tokens.counts(true, usual, self._labels)})


class OfTokens(Measure):
    """Losses of what is learned; of test rows with a prompt also the answers that are generated."""

    def __init__(self, prepared: Prepared, splits: Splits, generate: int) -> None:
        super().__init__(prepared, splits, generate)
        self.figures = (Figure("loss per token", _ratio, ("loss", "tokens"), "lower", percent=False),)
        task = prepared.config.model.task
        self._answers: Answers | None = None
        if generate and task in ("causal-lm", "seq2seq-lm") and "labels" in splits.test.rows.column_names:
            answers = Answers(replace(prepared, rows=splits.train, evaluation=splits.test), generate)
            if answers.prompts:
                self._answers = answers
                self.figures += tuple(Figure(name, of, (name,), percent=name != "chrF") for name, _, of in OF_ANSWERS)

    def columns(self, prepared: Prepared, trainer: Any, tested: bool) -> tuple[Columns, float]:
        part = self._splits.test if tested else self._splits.validation
        losses = token_losses(prepared, trainer, part).learned()
        kept: Columns = {"loss": losses.sums, "tokens": losses.tokens}
        loss = self.chief.value(kept)
        if not np.isfinite(loss):
            raise RunFailed("what it computes is no number")
        if tested and self._answers is not None:
            kept |= self._answers.kept(self._answers.measure(prepared, trainer))
        return kept, loss


def _ratio(sums: Any, counts: Any) -> float:
    """Over all tokens, so that long rows weigh more."""
    return float(sums.sum() / counts.sum())


def measure_of(prepared: Prepared, splits: Splits, generate: int) -> Measure:
    """What is measured of the task of `prepared`. Arguments as Measure's."""
    task, problem = prepared.config.model.task, prepared.config.data.problem_type
    kinds: dict[str, type[Measure]] = {
        SINGLE: OfClasses,
        SEVERAL: OfSeveralClasses,
        NUMBERS: OfNumbers,
        "token-classification": OfTags,
    }
    return kinds.get(problem or task, OfTokens)(prepared, splits, generate)


def check_task(task: str) -> None:
    """Raise UserError for a task that is not compared."""
    if task == "question-answering":
        raise UserError(
            f"data: expected classes, numbers, tags, answers or texts to compare methods by, got task {task}"
        )
