"""What may be wrong with rows though each of them can be trained on: repeats, leaks, labels that do not meet."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .chat import messages_of
from .encoded import Encoded
from .kinds import Kind, kind_of
from .near import NearIndex, Sketch, runs_of

WORDS = 3
"""Of a run, by which near duplicates are told."""
SHOWN = 5
"""Row numbers in a message."""


@dataclass(frozen=True)
class Sample:
    """One row, as rows are compared.

    Attributes:
        given: what the model reads, its white space and case made alike.
        answer: what it should say, as it stands; empty for plain texts.
        number: of the row, from 1.
    """

    given: str
    answer: str
    number: int


def samples(encoded: Encoded, kind: Kind) -> list[Sample]:
    """The rows that an encoding came from, each once."""
    return [Sample(*_parts(encoded.raw[number - 1], kind, number), number) for number in dict.fromkeys(encoded.numbers)]


def both_sides(rows: Encoded, evaluation: Encoded | None, kind: Kind) -> tuple[list[Sample], list[Sample]]:
    """Those to train on, and those to evaluate on, without documents that have blocks on either side."""
    measured = [] if evaluation is None else samples(evaluation, kind)
    if evaluation is not None and evaluation.raw is rows.raw:
        divided = set(rows.numbers)
        measured = [row for row in measured if row.number not in divided]
    return samples(rows, kind), measured


def repeated(rows: Sequence[Sample]) -> list[int]:
    """Numbers of rows whose text and answer an earlier one has."""
    seen: set[tuple[str, str]] = set()
    found = []
    for row in rows:
        key = (row.given, normalised(row.answer))
        if key in seen:
            found.append(row.number)
        seen.add(key)
    return found


def contradicting(rows: Sequence[Sample]) -> list[int]:
    """Numbers of rows whose text comes with different answers."""
    answers = defaultdict(set)
    for row in rows:
        answers[row.given].add(row.answer)
    return [row.number for row in rows if len(answers[row.given]) > 1]


def leaked(training: Sequence[Sample], evaluation: Sequence[Sample]) -> list[int]:
    """Numbers of evaluation rows whose text is trained on, whatever its answer there."""
    trained = {row.given for row in training}
    return [row.number for row in evaluation if row.given in trained]


def nearly_leaked(training: Sequence[Sample], evaluation: Sequence[Sample], threshold: float) -> list[int]:
    """Numbers of evaluation rows whose text is at least `threshold` like one that is trained on.

    Args:
        threshold: of the Jaccard similarity of runs of WORDS words; above 0 and below 1.

    Raises:
        MissingExtraError: datasketch is not installed.
    """
    index = NearIndex(threshold, "near duplicates")

    def sketch(row: Sample) -> Sketch:
        return index.sketch(runs_of(row.given.split(), WORDS))

    for place, row in enumerate(training):
        index.add(place, sketch(row))
    return [row.number for row in evaluation if index.alike(sketch(row))]


def notes_on(training: Sequence[Sample], evaluation: Sequence[Sample], *, labelled: bool) -> list[str]:
    """What should be looked at, in words.

    Args:
        training, evaluation: the latter empty where nothing is evaluated.
        labelled: answers are classes, so that a text has one.
    """
    found = []
    if numbers := repeated(training):
        found.append(f"{_rows(numbers)} repeat an earlier training row: what is repeated weighs more")
    if numbers := repeated(evaluation):
        found.append(f"{_rows(numbers)} of the evaluation repeat an earlier one: intervals take them for new rows")
    if labelled and (numbers := contradicting(training)):
        found.append(f"{_rows(numbers)} have a text that training rows give different labels")
    if labelled and evaluation:
        known, asked = {row.answer for row in training}, {row.answer for row in evaluation}
        if missing := sorted(asked - known):
            found.append(f"no training row has the evaluation's label {_named(missing)}: it cannot be learned")
        if missing := sorted(known - asked):
            found.append(f"no evaluation row has the training rows' label {_named(missing)}: it is not measured")
    return found


def leak_notes(rows: Encoded, evaluation: Encoded | None, task: str) -> list[str]:
    """In words, at most one: evaluation rows whose text is trained on. `task` is what the rows are read for."""
    training, measured = both_sides(rows, evaluation, kind_of(rows.raw.column_names, task))
    found = leaked(training, measured) if measured else []
    return [leak_note(found, len(measured))] if found else []


def leak_note(numbers: Sequence[int], of: int) -> str:
    """In words: so many evaluation rows are trained on."""
    return f"{_rows(numbers)} of the evaluation's {of} have a text that is trained on: they measure memory"


def normalised(text: str) -> str:
    """White space and case made alike."""
    return " ".join(text.casefold().split())


def _parts(row: dict[str, Any], kind: Kind, number: int) -> tuple[str, str]:
    """(given, answer) of a row."""
    if kind.name == "chat":
        messages = messages_of(row, f"data: row {number}")
        ends = [place for place, message in enumerate(messages) if message["role"] == "assistant"] or [len(messages)]
        answer = messages[ends[-1]]["content"] if ends[-1] < len(messages) else ""
        return _text(messages[: ends[-1]]), _plain(answer)
    if kind.name == "completion":
        return _text(row["prompt"]), _plain(row["completion"])
    if kind.name == "tagged":
        return _text(" ".join(map(str, row["tokens"]))), _plain(row["tags"])
    if kind.name == "questions":
        return _text([row["question"], row["context"]]), _plain(row["answers"])
    if kind.name == "labelled":
        return _text([row["text"], row["text_pair"]] if row.get("text_pair") else row["text"]), str(row["label"])
    return _text(row["text"]), ""


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _text(value: Any) -> str:
    return normalised(_plain(value))


def _rows(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN])) + (", …" if len(numbers) > SHOWN else "")
    return f"{len(numbers)} row{'s' if len(numbers) > 1 else ''} ({shown})"


def _named(labels: Sequence[str]) -> str:
    return ", ".join(map(repr, labels[:SHOWN])) + (f" and {len(labels) - SHOWN} more" if len(labels) > SHOWN else "")
