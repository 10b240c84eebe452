"""Encoded rows: what a trainer reads, and what is told of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .dividing import divided

LEARNED = ("input_ids", "labels", "start_positions", "end_positions")
"""Columns that make a step what it is."""


@dataclass(frozen=True)
class Encoded:
    """Examples for a trainer.

    Attributes:
        rows: a `datasets.Dataset` with input_ids (list of int) and labels (list of int, IGNORED where not learned; one
            number for a class, a list of 0.0 and 1.0 for several), or start_positions and end_positions (int) of an
            answer, and attention_mask where the model's encoder wants one.
        cut: how many were longer than max_length.
        dropped: how many had nothing left to learn after that, and are not among `rows`.
        tokens: in all rows.
        were_cut: for each of `rows`, whether it was longer than max_length.
        raw: all rows as they were read, under the names of columns that are expected.
        numbers: for each of `rows`, which of `raw` it came from, counted from 1; blocks of one document, and windows
            over one context, share theirs.
    """

    rows: Any
    cut: int
    dropped: int
    tokens: int
    were_cut: tuple[bool, ...]
    raw: Any
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def summary(self) -> str:
        """In words: how many rows and tokens, and what was done to rows that were too long."""
        return f"{len(self)} rows ({self.tokens:,} tokens; {self.cut} cut, {self.dropped} left out)"

    def fingerprint(self) -> str:
        """SHA-256 of all token ids and labels, in their order."""
        return fingerprint(self.rows)

    def groups(self) -> list[list[int]]:
        """Places of the rows that were made of the same one, if they are windows over a text; else one each."""
        if "start_positions" not in self.rows.column_names:
            return [[place] for place in range(len(self))]
        found: dict[int, list[int]] = {}
        for place, number in enumerate(self.numbers):
            found.setdefault(number, []).append(place)
        return list(found.values())

    def divided(self, size: int | float, seed: int, key: str) -> tuple[Encoded, Encoded]:
        """Two parts, the second of groups drawn by `seed`. Rows that were dropped stay with the first.

        Args and errors as dividing.divided's, of groups.
        """
        groups = self.groups()
        first, second = (
            self.part([row for group in part for row in groups[group]])
            for part in divided(len(groups), size, seed, key)
        )
        return replace(first, cut=self.cut - second.cut, dropped=self.dropped), second

    def first(self, count: int) -> Encoded:
        """At most so many of the rows, from the beginning."""
        return self.part(range(min(count, len(self))))

    def part(self, places: Sequence[int]) -> Encoded:
        """The rows at these places, in this order; none of those that were dropped."""
        rows = self.rows.select(places)
        were_cut = tuple(self.were_cut[place] for place in places)
        numbers = tuple(self.numbers[place] for place in places)
        return Encoded(rows, sum(were_cut), 0, tokens_in(rows), were_cut, self.raw, numbers)


def tokens_in(rows: Any) -> int:
    """Of all rows together."""
    return sum(map(len, rows["input_ids"]))


def fingerprint(rows: Any) -> str:
    """SHA-256 of all token ids and labels of a `datasets.Dataset`, in their order."""
    import numpy as np

    digest = hashlib.sha256()
    names = [name for name in LEARNED if name in rows.column_names]
    for batch in rows.select_columns(names).iter(batch_size=1000):
        for values in zip(*(batch[name] for name in names), strict=True):
            for value in values:
                array = np.asarray(value)
                kind = np.float64 if array.dtype.kind == "f" else np.int32
                digest.update(array.astype(kind).tobytes() + b";")
    return digest.hexdigest()
