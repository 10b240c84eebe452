"""Answers that are parts of a text: SQuAD's figures, and the likeliest span over windows."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest

from fastpeft.config import DataSection
from fastpeft.data.encoding import Encoded, encode
from fastpeft.data.kinds import QUESTIONS
from fastpeft.data.questions import NOWHERE
from fastpeft.metrics.answers import best_span, exact_match, f1, measure
from tests.checkpoints import wordpieces


@pytest.mark.parametrize(
    ("guessed", "answers", "exact", "overlap"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("a tower in Paris", ["the tower", "Paris"], 0, 0.5),  # tower in paris: 2 * 1 / (3 + 1)
        ("an-other", ["another"], 1, 1),
        ("theatre", ["the atre"], 0, 0),  # articles are whole words
        ("b b c", ["b c c"], 0, 2 / 3),  # each word as often as both have it
        ("", [], 1, 1),
        ("the", [], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
        ("", ["the", "Paris"], 0, 0),  # an answer of nothing but an article is none
    ],
)
def test_compared_as_squad_does(guessed: str, answers: list[str], exact: float, overlap: float) -> None:
    assert exact_match(guessed, answers) == exact and f1(guessed, answers) == pytest.approx(overlap)


def test_the_likeliest_span_of_all() -> None:
    """Against trying all pairs."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        start, end = generator.integers(0, 5, (2, 12)).astype(float)
        offsets = [NOWHERE] * 3 + [[10 * i, 10 * i + 9] for i in range(6)] + [NOWHERE]
        score, first, last = best_span(start, end, offsets, 3)
        pairs = [(start[i] + end[j], -i, -j) for i in range(3, 9) for j in range(i, min(i + 3, 9))]
        wanted, i, j = max(pairs)
        assert (score, first, last) == (wanted, offsets[-i][0], offsets[-j][1])


def asked(*rows: tuple[str, str | None], max_length: int = 12) -> Encoded:
    given = [
        {
            "question": "q",
            "context": context,
            "answers": {
                "text": [] if answer is None else [answer],
                "answer_start": [] if answer is None else [context.index(answer)],
            },
        }
        for context, answer in rows
    ]
    data = DataSection(max_length=max_length, stride=2)
    return encode(datasets.Dataset.from_list(given), QUESTIONS, "question-answering", wordpieces(), data)


def sure_of(evaluation: Encoded, **spans: str | None) -> Any:
    """Scores that are high where a context has its text, and at the null position of windows without it."""
    starts, ends = np.zeros((2, len(evaluation), 20))
    for number, row in enumerate(evaluation.rows):
        context = evaluation.raw[evaluation.numbers[number] - 1]["context"]
        text = spans.get(context[0])
        first = row["null_position"]
        last = first
        if text is not None:
            a = context.index(text)
            inside = [i for i, (s, e) in enumerate(row["offsets"]) if s < a + len(text) and e > a]
            first, last = (inside[0], inside[-1]) if inside else (first, last)
        starts[number, first] = ends[number, last] = 5
    return starts, ends


LONG = "b c d e f g h i j k l m n o p"


def test_figures_by_question_over_windows() -> None:
    evaluation = asked((LONG, "m n"), ("x y z", "y"), ("u v", "u"))
    assert len(evaluation) > 3
    found = measure(sure_of(evaluation, b="m n", x="y z", u="v"), asked((LONG, "c")), evaluation, ())
    exact, overlap = found.metrics
    assert (exact.name, exact.rows, exact.value) == ("exact match", 3, pytest.approx(1 / 3))
    assert overlap.value == pytest.approx((1 + 2 / 3 + 0) / 3)
    whole = (2 * 2 / (15 + 2) + 2 / 4 + 2 / 3) / 3
    assert overlap.baseline == pytest.approx(whole) and overlap.against == "the whole context as the answer"


def test_nothing_is_an_answer_only_where_that_was_learned() -> None:
    evaluation = asked(("x y", "x"), (LONG, None))
    silent = sure_of(evaluation)
    found = measure(silent, asked(("x y", None)), evaluation, ())
    named = {metric.name: (metric.value, metric.rows, metric.baseline) for metric in found.metrics}
    assert named["exact match"] == (0.5, 2, 0.5)
    assert named["exact match, questions with an answer"] == (0.0, 1, None)
    assert named["exact match, questions without"] == (1.0, 1, None)
    assert found.notes == ("the model answers no question of the evaluation, though some have an answer",)
    found = measure(silent, asked(("x y", "x")), evaluation, ())
    assert found.metrics[2].value == 0.0 and not found.notes, "then every question gets an answer"


def test_one_window_that_knows_the_answer_is_enough() -> None:
    """The others say that there is none in them."""
    evaluation = asked((LONG, "p"), ("x", None))
    found = measure(sure_of(evaluation, b="p"), asked(("x y", None)), evaluation, ())
    assert found.metrics[0].value == 1.0
