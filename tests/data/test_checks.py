"""What is said of rows before training: repeats, contradictions, leaks, labels that do not meet."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from fastpeft.data.checks import contradicting, leak_note, leaked, nearly_leaked, notes_on, repeated, samples
from fastpeft.data.encoding import Encoded
from fastpeft.data.kinds import kind_of


def rows(*given: dict[str, Any], numbers: tuple[int, ...] | None = None) -> Any:
    raw = datasets.Dataset.from_list(list(given))
    numbers = numbers or tuple(range(1, len(given) + 1))
    return samples(Encoded(None, 0, 0, 0, (), raw, numbers), kind_of(raw.column_names, "auto"))


def labelled(*pairs: tuple[str, str]) -> Any:
    return rows(*({"text": text, "label": label} for text, label in pairs))


def texts(*given: str) -> Any:
    return rows(*({"text": text} for text in given))


def test_rows_are_compared_by_words_whatever_case_and_white_space() -> None:
    found = labelled(("A  dog", "x"), ("a cat", "x"), ("a dog\n", "x"), ("a dog", "y"))
    assert repeated(found) == [3], "the same label too; the first is no repeat"
    assert contradicting(found) == [1, 3, 4]


def test_only_rows_that_are_trained_on_count_and_documents_once() -> None:
    found = rows({"text": "a"}, {"text": "a"}, {"text": "b"}, numbers=(1, 3, 3, 3))
    assert [row.number for row in found] == [1, 3]


def test_chats_and_completions_are_compared_by_what_comes_before_the_last_answer() -> None:
    turns = [("user", "Hi"), ("assistant", "yes"), ("user", "and?"), ("assistant", "no")]
    chat = [{"role": role, "content": content} for role, content in turns]
    asked, told = rows({"messages": chat}), rows({"messages": [*chat[:3], {"role": "assistant", "content": "maybe"}]})
    assert leaked(asked, told) == [1] and told[0].answer == "maybe"
    assert leaked(asked, rows({"messages": chat[:2]})) == []
    prompts = rows({"prompt": "Two", "completion": "2"}, {"prompt": "two", "completion": "II"})
    assert leaked(prompts[:1], prompts[1:]) == [2]


def test_a_pair_is_one_text() -> None:
    found = rows(*({"text": "a", "text_pair": pair, "label": "x"} for pair in ("b", "c", "b")))
    assert repeated(found) == [3]


def test_notes_name_counts_and_the_first_rows() -> None:
    training = labelled(*[("same", "x")] * 8, ("other", "y"))
    found = notes_on(training, labelled(("new", "x"), ("more", "z")), labelled=True)
    assert found == [
        "7 rows (2, 3, 4, 5, 6, …) repeat an earlier training row: what is repeated weighs more",
        "no training row has the evaluation's label 'z': it cannot be learned",
        "no evaluation row has the training rows' label 'y': it is not measured",
    ]
    assert leak_note([4], 9).startswith("1 row (4) of the evaluation's 9 ")


def test_rows_without_faults_give_no_note() -> None:
    assert notes_on(labelled(("a", "x"), ("b", "y")), labelled(("c", "x"), ("d", "y")), labelled=True) == []
    assert notes_on(texts("a", "b"), [], labelled=False) == []


@pytest.mark.parametrize(("threshold", "expected"), [(0.5, [1, 3]), (35 / 41, [1, 3]), (35.1 / 41, [3]), (0.9, [3])])
def test_near_duplicates_by_their_exact_likeness(threshold: float, expected: list[int]) -> None:
    words = [f"word{number}" for number in range(40)]
    training = texts(" ".join(words), "something else altogether")
    changed = " ".join([*words[:20], "new", *words[21:]])
    held = texts(changed, "nothing of the kind", " ".join(words).upper())
    assert nearly_leaked(training, held, threshold) == expected
