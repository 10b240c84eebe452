"""Classes and their order."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from fastpeft.data.labels import find_labels, named_labels
from fastpeft.errors import UserError


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
