"""Words with tags: which token has which label, what is cut, what is refused."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from fastpeft.config import DataSection
from fastpeft.data.chat import IGNORED as NO
from fastpeft.data.encoding import Encoded, encode
from fastpeft.data.kinds import TAGGED
from fastpeft.data.labels import resolve_labels
from fastpeft.errors import UserError
from tests.checkpoints import characters, wordpieces

B, I, O = 0, 1, 2  # noqa: E741


def encoded(tokenizer: Any, *rows: dict[str, Any], **settings: Any) -> Encoded:
    data = DataSection(**{"max_length": 16, "labels": ["B-X", "I-X", "O"], **settings})
    return encode(datasets.Dataset.from_list(list(rows)), TAGGED, "token-classification", tokenizer, data)


def row(words: str, tags: str) -> dict[str, Any]:
    return {"tokens": words.split(), "tags": tags.split()}


def test_the_first_token_of_a_word_has_its_label() -> None:
    whole = encoded(wordpieces(), row("ab c def", "B-X I-X O"))
    [found] = whole.rows
    assert found["labels"] == [NO, B, NO, I, O, NO, NO, NO]  # [CLS] a ##b c d ##e ##f [SEP]
    assert found["places"] == [1, 3, 4] and whole.numbers == (1,)


def test_all_tokens_of_a_word_on_demand() -> None:
    [found] = encoded(wordpieces(), row("ab c def", "B-X I-X O"), label_all_pieces=True).rows
    assert found["labels"] == [NO, B, I, I, O, O, O, NO], "an entity begins once"


@pytest.mark.parametrize("trims", [True, False])
def test_a_space_that_belongs_to_a_words_token(trims: bool) -> None:
    [found] = encoded(characters(trim_offsets=trims), row("b ac d", "B-X O I-X")).rows
    assert found["labels"] == [B, O, NO, NO, I]  # b, " a", c, " ", d
    assert found["places"] == [0, 1, 4]


def test_words_without_a_token() -> None:
    """An empty word, and one that the tokenizer leaves out, have no place; the others keep theirs."""
    [found] = encoded(wordpieces(), {"tokens": ["a", "", "\u0007", "b"], "tags": ["O", "O", "O", "B-X"]}).rows
    assert found["labels"] == [NO, O, B, NO] and found["places"] == [1, -1, -1, 2]


def test_longer_rows_are_cut_and_counted() -> None:
    found = encoded(wordpieces(), row("abcde fg h", "B-X I-X O"), row("a", "O"), max_length=8)
    assert found.rows["places"][:] == [[1, 6, -1], [1]] and found.were_cut == (True, False)
    assert [len(ids) for ids in found.rows["input_ids"]] == [8, 3] and found.cut == 1


def test_rows_without_words_are_left_out_and_counted() -> None:
    found = encoded(wordpieces(), row("", ""), row("a b", "O O"))
    assert found.numbers == (2,) and found.dropped == 1


def test_many_labels_are_not_cut_with_the_rows() -> None:
    tags = [f"B-{number}" for number in range(40)]
    [found] = encoded(wordpieces(), row("a", "B-39"), labels=tags, max_length=4).rows
    assert found["labels"] == [NO, 39, NO]


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        ("ab", ["O"], r"column tokens: expected a list of words, got 'ab' \(str\)"),
        ([1], ["O"], r"column tokens: expected a list of words, got '1' \(int\) in it"),
        (["a", "b"], ["O"], "column tags: expected as many as tokens, 2, got 1"),
        (["a"], "O", "column tags: expected as many as tokens, 1, got 'O'"),
        (["a"], ["B-Y"], "column tags: expected one of B-X, I-X, O, got 'B-Y'"),
    ],
)
def test_rows_that_are_none(words: Any, tags: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^data: row 1, {message}$"):
        encoded(wordpieces(), {"tokens": words, "tags": tags})


def test_numbered_tags_get_the_names_that_datasets_has() -> None:
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B-X"])),
        }
    )
    rows = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[1, 0]]}, features=features)
    data, named, same = resolve_labels("token-classification", DataSection(), rows, rows)
    assert data.labels == ["O", "B-X"] and named["tags"][:] == same["tags"][:] == [["B-X", "O"]]
