"""Encoded rows: what a trainer reads, and what is told of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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

    def divided(self, count: int, seed: int) -> tuple[Encoded, Encoded]:
        """Two parts, the second of `count` groups drawn by `seed`. Rows that were dropped stay with the first."""
        import datasets

        groups = self.groups()
        drawn = datasets.Dataset.from_dict({"group": range(len(groups))}).train_test_split(test_size=count, seed=seed)
        first, second = ([row for group in drawn[name]["group"] for row in groups[group]] for name in ("train", "test"))
        held = sum(self.were_cut[row] for row in second)
        return self._part(first, self.cut - held, self.dropped), self._part(second, held, 0)

    def first(self, count: int) -> Encoded:
        """At most so many of the rows, from the beginning."""
        places = range(min(count, len(self)))
        return self._part(places, sum(self.were_cut[place] for place in places), 0)

    def _part(self, places: Sequence[int], cut: int, dropped: int) -> Encoded:
        rows = self.rows.select(places)
        were_cut = tuple(self.were_cut[place] for place in places)
        numbers = tuple(self.numbers[place] for place in places)
        return Encoded(rows, cut, dropped, tokens_in(rows), were_cut, self.raw, numbers)


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
