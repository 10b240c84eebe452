"""Questions: windows over a context, and where the answer is in each."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from fastpeft.config import DataSection
from fastpeft.data.encoding import Encoded, encode
from fastpeft.data.kinds import QUESTIONS
from fastpeft.data.questions import NOWHERE
from fastpeft.errors import UserError
from tests.checkpoints import characters, wordpieces


def encoded(tokenizer: Any, *rows: dict[str, Any], **settings: Any) -> Encoded:
    data = DataSection(**{"max_length": 12, "stride": 2, **settings})
    return encode(datasets.Dataset.from_list(list(rows)), QUESTIONS, "question-answering", tokenizer, data)


def row(question: str, context: str, *answers: str) -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {"question": question, "context": context, "answers": {"text": list(answers), "answer_start": starts}}


def answer_in(found: dict[str, Any], context: str) -> str | None:
    """What start and end stand for; None for the row's null position."""
    first, last = found["start_positions"], found["end_positions"]
    if first == last == found["null_position"]:
        return None
    return context[found["offsets"][first][0] : found["offsets"][last][1]]


def test_one_window() -> None:
    context = "a bc, d"
    [found] = encoded(wordpieces(), row("q?", context, "bc", "d")).rows
    assert found["input_ids"][0] == 2 and found["null_position"] == 0
    assert found["offsets"][:4] == [NOWHERE] * 4 and found["offsets"][4] == [0, 1]  # [CLS] q ? [SEP] a
    assert found["offsets"][-1] == NOWHERE and answer_in(found, context) == "bc", "the first of the answers"


@pytest.mark.parametrize("tokenizer", [wordpieces(), characters(), characters(begins=True), characters(ends=True)])
@pytest.mark.parametrize("stride", [None, 0, 2, 50])
def test_windows_read_the_whole_context_and_share_tokens(tokenizer: Any, stride: int | None) -> None:
    context, asked = "b c d e f g h i j k l m n o p q r s t", ("b", "h i", "t")
    found = encoded(tokenizer, *(row("q", context, answer) for answer in asked), stride=stride)
    assert all(len(window["input_ids"]) <= 12 for window in found.rows) and (found.cut, found.dropped) == (0, 0)
    for answer, numbers in zip(asked, found.groups(), strict=True):
        read = [[span for span in found.rows[number]["offsets"] if span != NOWHERE] for number in numbers]
        covered = {place for window in read for a, b in window for place in range(a, b)}
        assert covered >= {place for place, sign in enumerate(context) if sign != " "} and len(read) > 1
        answers = [answer_in(found.rows[number], context) for number in numbers]
        assert {text.strip() for text in answers if text} == {answer}
        first, last = context.index(answer), context.index(answer) + len(answer)
        assert [text is not None for text in answers] == [w[0][0] <= first and last <= w[-1][1] for w in read]


def test_a_question_without_an_answer() -> None:
    for answers in ({"text": [], "answer_start": []}, None):
        given = [row("q", "a b", "a"), row("q", "a b") | {"answers": answers}]
        assert answer_in(encoded(wordpieces(), *given).rows[1], "a b") is None


def test_spaces_around_an_answer_are_not_learned() -> None:
    [found] = encoded(wordpieces(), row("q", "a b c ", " c ")).rows
    assert answer_in(found, "a b c ") == "c"


def test_windows_of_one_question_stay_together() -> None:
    rows = [row("q", "b c d e f g h i j k l m n"[: 25 - number], "c") for number in range(10)]
    whole = encoded(wordpieces(), *rows)
    assert len(whole) > len(whole.groups()) == 10
    first, second = whole.divided(3, seed=0, key="key")
    parts = [set(part.numbers) for part in (first, second)]
    assert not parts[0] & parts[1] and len(parts[1]) == 3 == len(second.groups())
    assert len(first) + len(second) == len(whole) and first.raw is whole.raw
    assert first.tokens + second.tokens == whole.tokens and first.fingerprint() != whole.fingerprint()


def test_where_an_answer_is_changes_the_fingerprint() -> None:
    prints = {encoded(wordpieces(), row("q", "a b", answer)).fingerprint() for answer in ("a", "b")}
    assert len(prints) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": ""}, "column context: expected text, got an empty one"),
        ({"question": 1}, r"column question: expected text, got '1' \(int\)"),
        ({"question": "q " * 20}, "column question: expected fewer than data.max_length 12 tokens, got 23"),
        ({"answers": "a"}, r"column answers: expected a mapping with text and answer_start, got 'a' \(str\)"),
        (
            {"answers": {"text": ["a"], "answer_start": ["0"]}},
            r"column answers: expected a list of whole numbers as answer_start, got '0' \(str\) in it",
        ),
        (
            {"answers": {"text": ["a"], "answer_start": [0, 1]}},
            "column answers: expected as many of answer_start as of text, 1, got 2",
        ),
        (
            {"answers": {"text": ["b"], "answer_start": [0]}},
            "column answers: expected 'b' in the context at 0, got 'a'",
        ),
        (
            {"answers": {"text": ["b"], "answer_start": [-1]}},
            "column answers: expected 'b' in the context at -1, got ''",
        ),
    ],
)
def test_rows_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^data: row 1, {message}$"):
        encoded(wordpieces(), row("q", "a b", "b") | change)
