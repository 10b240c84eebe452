"""Rows that tiny models learn, for each kind of head."""

from __future__ import annotations

import random
from typing import Any

NAMES, PLACES = ["ann", "bob", "eve"], ["rome", "oslo"]


def tagged(count: int = 16) -> list[dict[str, Any]]:
    rows = []
    for name, place in _drawn(count):
        rows.append({"tokens": [name, "is", "in", place], "tags": ["B-PER", "O", "O", "B-LOC"]})
    return rows


def questions(count: int = 16) -> list[dict[str, Any]]:
    """Some have no answer; some have a context of several windows."""
    rows = []
    for number, (name, place) in enumerate(_drawn(count)):
        context = "x y " * (30 if number % 4 == 3 else 1) + f"{name} is in {place}"
        question, answer = [("who?", name), ("where?", place), ("why?", None)][number % 3]
        answers = {"text": [answer] * (answer is not None), "answer_start": []}
        if answer is not None:
            answers["answer_start"] = [context.index(answer)]
        rows.append({"question": question, "context": context, "answers": answers})
    return rows


def several(count: int = 16) -> list[dict[str, Any]]:
    return [{"text": f"{name} {place}", "label": sorted({name, place} - {"eve"})} for name, place in _drawn(count)]


def numbered(count: int = 16) -> list[dict[str, Any]]:
    """Pairs, and how many words the first has."""
    generator = random.Random(0)
    lengths = [generator.randint(1, 6) for _ in range(count)]
    return [{"text": "a " * length, "text_pair": "b", "label": length / 4} for length in lengths]


def _drawn(count: int) -> list[tuple[str, str]]:
    generator = random.Random(0)
    return [(generator.choice(NAMES), generator.choice(PLACES)) for _ in range(count)]
