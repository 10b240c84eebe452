"""Classes and their order."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from fastpeft.config import DataSection
from fastpeft.data.encoding import encode
from fastpeft.data.kinds import LABELLED
from fastpeft.data.labels import NUMBERS, SEVERAL, SINGLE, find_labels, named_labels, problem_of, resolve_labels
from fastpeft.errors import UserError
from tests.checkpoints import wordpieces


def labelled(*labels: Any, features: Any = None) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": ["some"] * len(labels), "label": list(labels)}, features=features)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((10, 2, 10, -1), ["-1", "2", "10"]),
        (("b", "a", "b"), ["a", "b"]),
        (("10", "2"), ["10", "2"]),
        ((True, False, True), ["False", "True"]),
    ],
)
def test_numbers_in_their_order_and_names_in_the_alphabets(given: tuple[Any, ...], wanted: list[str]) -> None:
    assert find_labels(labelled(*given)) == wanted


def test_names_that_datasets_keeps_apart_from_numbers() -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["low", "high"])}
    )
    rows = named_labels(labelled(1, 0, None, -1, features=features))
    assert rows["label"][:] == ["high", "low", None, None]
    assert find_labels(labelled(1, 0, features=features)) == ["low", "high"]
    plain = labelled("a", "b")
    assert named_labels(plain) is plain


def test_too_many_classes_are_hardly_classes() -> None:
    assert len(find_labels(labelled(*range(1000)))) == 1000
    with pytest.raises(UserError, match=r"^data: expected 2 to 1000 classes in column label, got 1001$"):
        find_labels(labelled(*range(1001)))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("a", "b"), SINGLE),
        ((1, 2), SINGLE),
        ((True, False), SINGLE),
        ((1.0, 2.0), SINGLE),  # whole numbers with a fraction's type may be classes: refused, with what to say
        ((1.0, 2.5), NUMBERS),
        ((["a"], []), SEVERAL),
        (([1, 2], [2]), SEVERAL),
    ],
)
def test_what_labels_ask_for(given: tuple[Any, ...], problem: str) -> None:
    assert problem_of(labelled(*given)) == problem


def learned(*labels: Any, **settings: Any) -> list[Any]:
    task = "sequence-classification"
    data, rows, _ = resolve_labels(task, DataSection(max_length=8, **settings), labelled(*labels), None)
    return list(encode(rows, LABELLED, task, wordpieces(), data).rows["labels"])


def test_several_classes_a_row() -> None:
    assert learned(["b", "a"], [], ["c"]) == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert learned([2, 10], [2]) == [[1, 1], [1, 0]]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.List(datasets.ClassLabel(names=["low", "high"]))}
    )
    rows = labelled([1], [1, 0], features=features)
    data, named, _ = resolve_labels("sequence-classification", DataSection(), rows, None)
    assert (data.labels, named["label"][:]) == (["low", "high"], [["high"], ["high", "low"]])


def test_more_classes_than_tokens_are_all_kept() -> None:
    assert learned(["a"], ["b"], labels=[*"abcdefghijkl"])[1] == [0.0, 1.0, *[0.0] * 10]


def test_numbers_to_learn() -> None:
    assert learned(0.5, 2.0) == [0.5, 2.0]
    assert learned(1, 2, problem_type=NUMBERS) == [1.0, 2.0]
    assert learned("1.5", "-2", problem_type=NUMBERS) == [1.5, -2.0], "as tables have them"


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        (
            (1.0, 2.0),
            {},
            r"data: row 1, column label: expected a class as text .* \(float\); data.problem_type regress",
        ),
        (("a", "b"), {"problem_type": NUMBERS}, r"data: row 1, column label: expected a number, got 'a' \(str\)"),
        ((None, 1.5), {"problem_type": NUMBERS}, "data: row 1, column label: expected a number, got null"),
        ((0.5, float("inf")), {"problem_type": NUMBERS}, "data: row 2, column label: expected a number, got 'inf'"),
        (("a", "b"), {"problem_type": SEVERAL}, r"data: row 1, column label: expected a list of classes, got 'a'"),
        ((["a"], ["a"]), {}, "data: expected 2 to 1000 classes in column label, got one: 'a'"),
        ((["a"], ["b"]), {"labels": ["a", "c"]}, "data: row 2, column label: expected one of a, c, got 'b'"),
        ((0.5, 1.5), {"labels": ["a", "b"]}, r"data.labels: expected null for data.problem_type regression, got \["),
    ],
)
def test_labels_that_are_none(labels: tuple[Any, ...], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        learned(*labels, **settings)


def test_only_texts_have_a_problem_type() -> None:
    with pytest.raises(UserError, match=r"^data.problem_type: expected null for task causal-lm, got 'regression'$"):
        resolve_labels("causal-lm", DataSection(problem_type="regression"), None, None)
