"""Columns: renamed, and what kind of data they make."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from fastpeft.data.kinds import (
    ALPACA,
    CHAT,
    COMPLETION,
    LABELLED,
    QUESTIONS,
    SHAREGPT,
    TAGGED,
    TEXT,
    Kind,
    kind_of,
    rename,
)
from fastpeft.errors import UserError


@pytest.mark.parametrize(
    ("columns", "task", "kind"),
    [
        ("messages", "auto", CHAT),
        ("conversations id", "auto", SHAREGPT),
        ("prompt completion", "auto", COMPLETION),
        ("prompt messages", "auto", CHAT),
        ("instruction input output text", "auto", ALPACA),
        ("instruction output", "auto", ALPACA),
        ("text label", "auto", LABELLED),
        ("text text_pair label", "auto", LABELLED),
        ("id tokens tags", "auto", TAGGED),
        ("id title question context answers", "auto", QUESTIONS),
        ("text label", "causal-lm", TEXT),
        ("text label", "masked-lm", TEXT),
        ("text title", "auto", TEXT),
        ("text prompt completion", "seq2seq-lm", COMPLETION),
        ("messages text", "masked-lm", TEXT),
    ],
)
def test_columns_make_a_kind(columns: str, task: str, kind: Kind) -> None:
    assert kind_of(columns.split(), task) is kind


@pytest.mark.parametrize(("columns", "task"), [("messages", "seq2seq-lm"), ("text", "sequence-classification")])
def test_a_kind_that_does_not_serve_the_task(columns: str, task: str) -> None:
    with pytest.raises(UserError, match=f"^data: expected columns .* for task {task}, got {columns}$"):
        kind_of([columns], task)


def renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    [found] = rename(datasets.Dataset.from_list([row]), columns).to_list()
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({}, {"text": 1, "review": 2, "stars": 3}),
        ({"text": "review", "label": "stars"}, {"text": 2, "label": 3}),
        ({"text": "text", "label": "stars"}, {"text": 1, "label": 3, "review": 2}),
        ({"prompt": "text", "completion": "review"}, {"prompt": 1, "completion": 2, "stars": 3}),
    ],
)
def test_columns_get_the_expected_names(columns: dict[str, str], wanted: dict[str, int]) -> None:
    assert renamed({"text": 1, "review": 2, "stars": 3}, columns) == wanted


def test_two_columns_change_places() -> None:
    columns = {"prompt": "completion", "completion": "prompt"}
    assert renamed({"prompt": 1, "completion": 2}, columns) == {"prompt": 2, "completion": 1}


def test_one_column_cannot_be_two() -> None:
    with pytest.raises(UserError, match=r"^data.columns.completion: expected another column than data.columns.prompt"):
        renamed({"text": 1}, {"prompt": "text", "completion": "text"})
