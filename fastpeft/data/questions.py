"""Questions about a text, answered by a part of it: windows over the text, and where the answer is in each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastpeft.config import DataSection
from fastpeft.errors import UserError

from .chat import short
from .columns import Row, list_of, words_of

NOWHERE = [-1, -1]
"""The characters of a token that is not of the context."""


def windows(tokenizer: Any, data: DataSection) -> Callable[[Row, str], list[Row]]:
    """Encodes `question`, `context` and `answers` as SQuAD has them: {text: [...], answer_start: [...]}.

    A context that is too long for one row is read in several, which share `data.stride` tokens. Where the first of the
    answers is not wholly within one, as where there is none, start and end are the row's `null_position`. A row's
    `offsets` are the characters of the context that each token is of, NOWHERE for others.
    """
    if not tokenizer.is_fast:
        raise UserError(f"model.name: expected a fast tokenizer, got {type(tokenizer).__name__}")

    def encode_question(row: Row, where: str) -> list[Row]:
        question, context = (words_of(row, name, where) for name in ("question", "context"))
        first = next(iter(answers_of(row, where)), None)
        found = []
        for encoded in read_in_windows(tokenizer, question.strip(), context, data, where):
            start = end = encoded["null_position"]
            if first is not None:
                start, end = _tokens_of(first, encoded["offsets"], encoded["null_position"])
            found.append(encoded | {"start_positions": start, "end_positions": end})
        return found

    return encode_question


def answers_of(row: Row, where: str) -> list[tuple[int, int]]:
    """(first character, the one behind the last) of each answer in the context, in their order.

    Raises:
        UserError: answers of another form, or the context has something else there.
    """
    given = row["answers"]
    if given is None:
        return []
    if not isinstance(given, dict) or not {"text", "answer_start"} <= set(given):
        raise UserError(f"{where}, column answers: expected a mapping with text and answer_start, got {short(given)}")
    texts = list_of(given["text"], "answers", str, "text", where)
    starts = list_of(given["answer_start"], "answers", int, "whole numbers as answer_start", where)
    if len(texts) != len(starts):
        raise UserError(
            f"{where}, column answers: expected as many of answer_start as of text, {len(texts)}, got {len(starts)}"
        )
    for text, start in zip(texts, starts, strict=True):
        there = row["context"][start : start + len(text)] if start >= 0 else ""
        if there != text or not text.strip():
            raise UserError(f"{where}, column answers: expected {text!r} in the context at {start}, got {there!r}")
    return [_without_spaces(text, start) for text, start in zip(texts, starts, strict=True)]


def _without_spaces(text: str, start: int) -> tuple[int, int]:
    start += len(text) - len(text.lstrip())
    return start, start + len(text.strip())


def read_in_windows(tokenizer: Any, question: str, context: str, data: DataSection, where: str) -> list[Row]:
    """One row a window, without labels. Raises UserError if the question leaves no room for a context."""
    assert data.max_length is not None
    length = data.max_length
    alone = len(tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"])
    alone += tokenizer.num_special_tokens_to_add(pair=True)
    room = length - alone
    stride = length // 3 if data.stride is None else data.stride
    if room < 1:
        raise UserError(f"{where}, column question: expected fewer than data.max_length {length} tokens, got {alone}")
    options = {"truncation": "only_second", "max_length": length, "stride": min(stride, room - 1)}
    encoded = tokenizer(
        question, context, **options, return_overflowing_tokens=True, return_offsets_mapping=True, verbose=False
    )
    inputs = [name for name in encoded if name not in ("offset_mapping", "overflow_to_sample_mapping")]
    rows = []
    for number, spans in enumerate(encoded["offset_mapping"]):
        row: Row = {name: list(encoded[name][number]) for name in inputs}
        parts = encoded.sequence_ids(number)
        row["offsets"] = [list(span) if part == 1 else NOWHERE for span, part in zip(spans, parts, strict=True)]
        null = tokenizer.cls_token_id
        row["null_position"] = row["input_ids"].index(null) if null in row["input_ids"] else 0
        rows.append(row)
    return rows


def _tokens_of(answer: tuple[int, int], offsets: list[list[int]], null: int) -> tuple[int, int]:
    """The first and last token with a character of the answer; twice `null` if part of it is in no token."""
    inside = [i for i, (start, end) in enumerate(offsets) if start < answer[1] and end > answer[0]]
    context = [span for span in offsets if span != NOWHERE]
    if not inside or context[0][0] > answer[0] or context[-1][1] < answer[1]:
        return null, null
    return inside[0], inside[-1]
