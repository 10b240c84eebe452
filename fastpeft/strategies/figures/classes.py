"""A classifier's figures: accuracy, F1, each class, which are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastpeft.metrics.classification import accuracy, f1_macro
from fastpeft.metrics.findings import Findings, Metric, Section
from fastpeft.metrics.intervals import over_rows
from fastpeft.requirements import require
from fastpeft.training.evaluating import classes
from fastpeft.training.preparing import Prepared

from .change import change

FIGURES = (("accuracy", accuracy), ("F1, mean of the classes", f1_macro))
MOST = 20
"""Classes of a confusion table; more are hard to read."""


def measure(prepared: Prepared, trainer: Any) -> list[int]:
    """The likeliest class of each row of the evaluation."""
    assert prepared.evaluation is not None
    return classes(prepared, trainer, prepared.evaluation)


def findings(prepared: Prepared, guessed: list[int], before: list[int] | None) -> Findings:
    """Beside what always guessing the training rows' most frequent class would get.

    Args:
        guessed, before: of `measure`, with the trained model and with it as loaded.
    """
    import numpy as np

    assert prepared.evaluation is not None
    true = np.asarray(prepared.evaluation.rows["labels"])
    usual = np.bincount(np.asarray(prepared.rows.rows["labels"])).argmax()
    most = np.full_like(true, usual)
    against = "the training rows' most frequent class"
    metrics = [Metric(name, *over_rows(of, true, guessed), len(true), of(true, most), against) for name, of in FIGURES]
    if before is not None:
        metrics += [change(name, of, (true, before), (true, guessed)) for name, of in FIGURES]
    labels = prepared.config.data.labels or []
    sections = (
        Section("Classes", per_class(true, guessed, labels)),
        Section("Confusion", confusion(true, guessed, labels)),
    )
    return Findings(tuple(metrics), _collapsed(guessed, true, labels), sections)


def per_class(true: Any, guessed: Any, labels: Sequence[str]) -> str:
    """Markdown: precision, recall, F1 and rows of each class; "-" where nothing is divided by nothing."""
    import numpy as np

    sklearn = require("train", "sklearn.metrics", "figures of each class")
    columns = sklearn.precision_recall_fscore_support(true, guessed, labels=range(len(labels)), zero_division=np.nan)
    lines = ["| class | precision | recall | F1 | rows |", "|---|---|---|---|---|"]
    for label, *scores, rows in zip(labels, *columns, strict=True):
        cells = " | ".join("-" if np.isnan(score) else f"{score:.3f}" for score in scores)
        lines.append(f"| {_cell(label)} | {cells} | {rows} |")
    return "\n".join(lines)


def confusion(true: Any, guessed: Any, labels: Sequence[str]) -> str:
    """Markdown: rows of each true class (down) by what they are taken for (across)."""
    sklearn = require("train", "sklearn.metrics", "the confusion table")
    table = sklearn.confusion_matrix(true, guessed, labels=range(len(labels)))
    if len(labels) > MOST:
        wrong = [(int(table[i, j]), i, j) for i, j in zip(*table.nonzero(), strict=True) if i != j]
        lines = [
            f"The most frequent of {len(wrong)} kinds of mistakes:",
            "",
            "| true | taken for | rows |",
            "|---|---|---|",
        ]
        for rows, i, j in sorted(wrong, reverse=True)[:MOST]:
            lines.append(f"| {_cell(labels[i])} | {_cell(labels[j])} | {rows} |")
        return "\n".join(lines)
    lines = [f"| true, taken for | {' | '.join(map(_cell, labels))} |", "|---" * (len(labels) + 1) + "|"]
    lines += [
        f"| {_cell(label)} | {' | '.join(map(str, row))} |" for label, row in zip(labels, table.tolist(), strict=True)
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _collapsed(guessed: Sequence[int], true: Any, labels: Sequence[str]) -> tuple[str, ...]:
    """A warning where one class is all that is ever predicted, though the rows have more."""
    found = set(guessed)
    if len(found) > 1 or len(set(true.tolist())) == 1:
        return ()
    return (
        f"the model predicts {labels[found.pop()]!r} for every row of the evaluation: it has learned nothing; "
        "a lower training.learning_rate, more steps, or other lora.target_modules may help",
    )
