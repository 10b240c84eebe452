"""Tags of words: entities as CoNLL counts them, words, and what is compared with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest

from fastpeft.config import DataSection
from fastpeft.data.encoding import Encoded, encode
from fastpeft.data.kinds import TAGGED
from fastpeft.metrics.tokens import measure, spans, token_metrics
from tests.checkpoints import wordpieces


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("B-P I-P O B-L", {("P", 0, 2), ("L", 3, 4)}),
        ("B-P B-P I-P", {("P", 0, 1), ("P", 1, 3)}),
        ("B-P I-L I-L", {("P", 0, 1)}),  # another type goes on from nothing
        ("I-P I-P O I-L", set()),
        ("O I-P B-P", {("P", 2, 3)}),
        ("B-a-b I-a-b I-a", {("a-b", 0, 2)}),
        ("", set()),
    ],
)
def test_entities_in_tags(tags: str, wanted: set[tuple[str, int, int]]) -> None:
    assert spans(tags.split()) == wanted


def test_figures_as_seqeval_has_them() -> None:
    """The example of seqeval's documentation, one row longer; its figures in strict mode."""
    true = ["O O O B-MISC I-MISC I-MISC O", "B-PER I-PER O", "B-PER O B-MISC"]
    guessed = ["O O B-MISC I-MISC I-MISC I-MISC O", "B-PER I-PER O", "B-PER O O"]
    labels = ["O", "B-MISC", "I-MISC", "B-PER", "I-PER"]
    rows = [[labels.index(tag) for tag in row.split()] for row in true]
    padded = np.full((3, 8), -100)
    likeliest = np.zeros((3, 8), dtype=int)
    for number, (row, guess) in enumerate(zip(rows, guessed, strict=True)):
        padded[number, 1 : 1 + len(row)] = row
        likeliest[number, 1 : 1 + len(row)] = [labels.index(tag) for tag in guess.split()]
    found = token_metrics(labels)(SimpleNamespace(label_ids=padded, predictions=likeliest))
    assert found == {
        "accuracy": pytest.approx(10 / 13),
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 4),
        "f1": pytest.approx(2 * 2 / (3 + 4)),
    }
    assert token_metrics(["N", "V"])(SimpleNamespace(label_ids=padded[:, 1:4] * 0, predictions=[[0, 0, 1]] * 3)) == {
        "accuracy": pytest.approx(2 / 3)
    }


LABELS = ["O", "B-P", "I-P", "B-L"]


def tagged(*rows: str, labels: list[str] = LABELS, max_length: int = 32) -> Encoded:
    pairs = [[pair.split("/") for pair in row.split()] for row in rows]
    columns = {"tokens": [[w for w, _ in row] for row in pairs], "tags": [[t for _, t in row] for row in pairs]}
    data = DataSection(max_length=max_length, labels=labels)
    return encode(datasets.Dataset.from_dict(columns), TAGGED, "token-classification", wordpieces(), data)


def answering(evaluation: Encoded, *rows: str, labels: list[str] = LABELS) -> Any:
    """Predictions that give the words these tags."""
    found = np.zeros((len(rows), 32), dtype=int)
    for row, (tags, places) in enumerate(zip(rows, evaluation.rows["places"], strict=True)):
        for tag, place in zip(tags.split(), places, strict=True):
            found[row, place] = labels.index(tag) if place >= 0 else found[row, place]
    return found


def values(found: Any) -> dict[str, tuple[float, float]]:
    return {metric.name: (metric.value, metric.baseline) for metric in found.metrics}


TRAINING = ("ann/B-P is/O here/O", "bob/B-P is/O here/O", "ann/O is/O here/O", "ann/B-P rome/B-L is/O")


def test_figures_beside_looking_words_up() -> None:
    evaluation = tagged("ann/B-P lee/I-P is/O", "bob/B-P rome/B-L new/O")
    guesses = answering(evaluation, "B-P I-P O", "B-P O O")
    found = measure(guesses, tagged(*TRAINING), evaluation, LABELS)
    assert values(found) == {
        "accuracy of the words": (pytest.approx(5 / 6), pytest.approx(5 / 6)),
        "F1 of the entities": (pytest.approx(4 / 5), pytest.approx(4 / 6)),  # looked up, ann is one without lee
        "precision of the entities": (1.0, pytest.approx(2 / 3)),
        "recall of the entities": (pytest.approx(2 / 3), pytest.approx(2 / 3)),
    }
    assert all(m.rows == 2 and m.low <= m.value <= m.high for m in found.metrics) and not found.notes
    assert "| L | 0 | 0 | 0 | 1 |" in found.sections[0].text and "| P | 1 | 1 | 1 | 2 |" in found.sections[0].text


def test_words_that_were_cut_off_are_not_found() -> None:
    evaluation = tagged("ann/B-P bob/B-P", max_length=6)
    assert evaluation.rows["places"][0] == [1, 4]
    evaluation = tagged("ann/B-P bob/B-P", max_length=5)
    found = measure(answering(evaluation, "B-P B-P"), tagged(*TRAINING), evaluation, LABELS)
    assert values(found)["recall of the entities"][0] == values(found)["accuracy of the words"][0] == 0.5
    assert values(found)["precision of the entities"][0] == 1.0


def test_tags_that_are_no_entities() -> None:
    labels = ["N", "V"]
    evaluation = tagged("ann/N is/V", "bob/N", labels=labels)
    training = tagged("ann/V is/V here/V", labels=labels)
    found = measure(answering(evaluation, "N V", "V", labels=labels), training, evaluation, labels)
    assert values(found) == {
        "accuracy of the words": (pytest.approx(2 / 3), pytest.approx(1 / 3)),
        "F1, mean of the tags": (pytest.approx(2 / 3), pytest.approx((0 + 1 / 2) / 2)),
    }


def test_what_should_be_looked_at() -> None:
    evaluation = tagged("ann/I-P is/O", "rome/B-L here/O")
    found = measure(answering(evaluation, "O O", "O O"), tagged(*TRAINING), evaluation, LABELS)
    one, other = found.notes
    assert one.startswith("the model predicts 'O' for every word of the evaluation: it has learned nothing")
    assert other.startswith("1 words of the evaluation have an I- tag that goes on from none of its type")
