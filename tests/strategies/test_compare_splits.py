"""The parts of a comparison's data: no twins, each class in its share."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import datasets
import pytest

from fastpeft.data.encoded import Encoded
from fastpeft.errors import UserError
from fastpeft.strategies.compare.splits import SHINGLE, split, without_twins

CLASSES = "sequence-classification"


def rows(count: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Of 30 random tokens, of which no two share a shingle worth mention; classes of 1/4 and 3/4."""
    drawn = random.Random(seed)
    return [[drawn.randrange(10_000) for _ in range(30)] for _ in range(count)], [
        int(number % 4 > 0) for number in range(count)
    ]


def encoded(tokens: list[list[int]], labels: list[Any]) -> Encoded:
    rows = datasets.Dataset.from_dict({"input_ids": tokens, "labels": labels})
    return Encoded(rows, 0, 0, sum(map(len, tokens)), (False,) * len(rows), rows, tuple(range(1, len(rows) + 1)))


def jaccard(one: list[int], other: list[int]) -> float:
    first, second = ({tuple(row[i : i + SHINGLE]) for i in range(len(row) - SHINGLE + 1)} for row in (one, other))
    return len(first & second) / len(first | second)


def test_repeated_and_nearly_repeated_rows_go() -> None:
    tokens, labels = rows(6)
    near = [*tokens[1][:-1], 7]  # one of 28 shingles is another
    far = [*tokens[2][:15], *tokens[3][15:]]
    found = without_twins([*tokens, tokens[0], near, far], [*labels, 1 - labels[0], labels[1], 0], 0.8)
    assert found == ([0, 1, 2, 3, 4, 5, 8], 1, 1, 1)
    assert without_twins([tokens[1], near], [0, 0], 1.0)[0] == [0, 1]


def test_rows_shorter_than_a_shingle_are_compared_too() -> None:
    assert without_twins([[5], [5], [6], [5, 6]], [0, 0, 0, 0], 0.8) == ([0, 2, 3], 1, 0, 0)


def test_parts_share_nothing_and_have_the_classes_in_their_shares() -> None:
    tokens, labels = rows(120)
    twins = [[*row[:-1], 3] for row in tokens[:40]]
    parts = split(encoded(tokens + twins, labels + labels[:40]), (40, 20, 32), 0.8, 0, CLASSES)
    assert (len(parts.train), len(parts.validation), len(parts.test), parts.near) == (40, 20, 32, 40)
    assert parts.unused == 120 - 40 - 20 - 32
    for part, ones in ((parts.train, 30), (parts.validation, 15), (parts.test, 24)):
        assert Counter(part.rows["labels"])[1] == ones
    held = [*parts.validation.rows["input_ids"], *parts.test.rows["input_ids"]]
    assert max(jaccard(one, other) for one in parts.train.rows["input_ids"] for other in held) < 0.8
    assert len({tuple(row) for row in [*parts.train.rows["input_ids"], *held]}) == 92


def test_the_seed_decides_who_is_where() -> None:
    data = encoded(*rows(60))
    first, again, other = (split(data, (20, 8, 8), 0.8, seed, CLASSES).test.rows["input_ids"] for seed in (0, 0, 1))
    assert first == again and first != other


def test_fewer_rows_than_asked_for_are_all_learned_from() -> None:
    parts = split(encoded(*rows(40)), (400, 8, 8), 0.8, 0, CLASSES)
    assert len(parts.train) == 24 and parts.unused == 0


def test_too_few_rows_are_counted() -> None:
    tokens, labels = rows(12)
    with pytest.raises(UserError, match=r"at least 20 different rows .* got 12 \(12 were repeated and 0 nearly so\)"):
        split(encoded(tokens * 2, labels * 2), (8, 8, 8), 0.8, 0, CLASSES)


def test_a_class_too_small_to_be_divided_is_refused() -> None:
    tokens, _ = rows(40)
    with pytest.raises(UserError, match="cannot be divided with each class in its share"):
        split(encoded(tokens, [0] * 39 + [1]), (8, 8, 8), 0.8, 0, CLASSES)


def test_rows_without_classes_are_drawn_as_they_come_and_what_all_begin_with_makes_no_twins() -> None:
    tokens, _ = rows(40)
    system = list(range(20_000, 20_200))
    answers = [[-100] * 229 + row[-1:] for row in tokens]
    parts = split(encoded([system + row for row in tokens], answers), (16, 8, 8), 0.8, 0, "causal-lm")
    assert (len(parts.train), len(parts.validation), len(parts.test), parts.near) == (16, 8, 8, 0)
    assert split(encoded(tokens, answers), (16, 8, 8), 0.8, 0, "seq2seq-lm").unused == 8
