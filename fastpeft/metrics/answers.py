"""How good answers that are parts of a text are: exact match and F1, as SQuAD defines them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastpeft.data.encoded import Encoded
from fastpeft.data.questions import NOWHERE, answers_of
from fastpeft.metrics.findings import Findings, Metric

from .intervals import over_rows

LONGEST = 30
"""Tokens of an answer, if none that was learned is longer."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(answer: str) -> list[str]:
    """Its words, in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split()


def exact_match(guessed: str, answers: Sequence[str]) -> float:
    """1.0 if it is one of the answers, compared as normalised; where there are none, if nothing is guessed."""
    return float(any(normalised(guessed) == normalised(answer) for answer in _wanted(answers)))


def f1(guessed: str, answers: Sequence[str]) -> float:
    """F1 of the words that it shares with an answer, of the answer that it is nearest to."""
    return max(_overlap(normalised(guessed), normalised(answer)) for answer in _wanted(answers))


def _wanted(answers: Sequence[str]) -> Sequence[str]:
    return [answer for answer in answers if normalised(answer)] or [""]


def _overlap(guessed: list[str], answer: list[str]) -> float:
    if not guessed or not answer:
        return float(guessed == answer)
    shared = sum((Counter(guessed) & Counter(answer)).values())
    return 2 * shared / (len(guessed) + len(answer))


def best_span(start: Any, end: Any, offsets: Sequence[Sequence[int]], longest: int) -> tuple[float, int, int]:
    """(score, first character, the one behind the last) of the likeliest answer in one window.

    Args:
        start, end: scores of each token, (at least as many as offsets,).
        offsets: the characters that each token is of; NOWHERE for those of no context.
        longest: tokens of an answer.
    """
    import numpy as np

    inside = np.asarray([list(span) != NOWHERE for span in offsets])
    first, last = (np.where(inside, np.asarray(x, np.float64)[: len(inside)], -np.inf) for x in (start, end))
    best = (-np.inf, 0, 0)
    for more in range(min(longest, len(inside))):
        scores = first[: len(inside) - more] + last[more:]
        place = int(scores.argmax())
        best = max(best, (float(scores[place]), -place, -more))  # of equal ones the first, and the shortest
    score, place, more = best[0], -best[1], -best[2]
    return score, offsets[place][0], offsets[place + more][1]


def answers_from(
    predictions: Any,
    rows: Any,
    contexts: Sequence[str],
    groups: Sequence[Sequence[int]],
    longest: int,
    *,
    nothing: bool,
) -> list[str]:
    """One text a group of windows, the likeliest span of all; empty where "no answer" is likelier than each.

    Args:
        predictions: (start, end) scores, (windows, tokens) each.
        rows: with offsets and null_position, of each window.
        contexts: of each group.
        groups: numbers of the windows of each question.
        longest: tokens of an answer.
        nothing: whether a question may have no answer. How likely that is, is what its least sure window says.
    """
    starts, ends = predictions[0], predictions[1]
    offsets, nulls = rows["offsets"][:], rows["null_position"][:]
    found = []
    for context, numbers in zip(contexts, groups, strict=True):
        score, first, last = max(
            (best_span(starts[n], ends[n], offsets[n], longest) for n in numbers), key=lambda span: span[0]
        )
        null = min(float(starts[n][nulls[n]]) + float(ends[n][nulls[n]]) for n in numbers)
        found.append("" if nothing and null > score else context[first:last].strip())
    return found


def measure(predictions: Any, training: Encoded, evaluation: Encoded, labels: Sequence[str]) -> Findings:
    """Figures over the evaluation's questions.

    Args:
        predictions: (start, end) scores, (windows, tokens) each.
        training, evaluation: from data.questions.
        labels: none.
    """
    import numpy as np

    groups = evaluation.groups()
    asked = evaluation.raw.select([evaluation.numbers[places[0]] - 1 for places in groups])
    right = [[row["context"][a:b] for a, b in answers_of(row, "data")] for row in asked]
    learned = np.asarray(training.rows["end_positions"]) - np.asarray(training.rows["start_positions"]) + 1
    asked_before = training.raw.select([number - 1 for number in sorted({*training.numbers})])
    nothing = any(not answers_of(row, "data") for row in asked_before)
    contexts = asked["context"][:]
    longest = max(LONGEST, int(learned.max()))
    guessed = answers_from(predictions, evaluation.rows, contexts, groups, longest, nothing=nothing)
    answerable = np.asarray([bool(answers) for answers in right])
    trivial = contexts if answerable.all() else [""] * len(contexts)
    against = "the whole context as the answer" if answerable.all() else "no answer to any question"
    metrics = []
    for name, of in (("exact match", exact_match), ("F1 of the words", f1)):
        ours, base = (np.asarray([*map(of, texts, right)]) for texts in (guessed, trivial))
        metrics.append(Metric(name, *over_rows(np.mean, ours), len(ours), float(base.mean()), against))
        if 0 < answerable.sum() < len(answerable):
            for kind, which in (("with an answer", answerable), ("without", ~answerable)):
                metrics.append(Metric(f"{name}, questions {kind}", *over_rows(np.mean, ours[which]), int(which.sum())))
    return Findings(tuple(metrics), _silent(guessed, answerable))


def _silent(guessed: list[str], answerable: Any) -> tuple[str, ...]:
    if any(guessed) or not answerable.any():
        return ()
    return ("the model answers no question of the evaluation, though some have an answer",)
