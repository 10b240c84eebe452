"""Which rows are measured on, and which few are trained on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from fastpeft.data.cleaning import compared_words
from fastpeft.data.columns import class_of as number_of_class
from fastpeft.data.columns import words_of
from fastpeft.data.near import NearIndex, Sketch, runs_of
from fastpeft.errors import UserError

WORDS = 3
"""Of a run, by which near duplicates are told."""


def text_of(row: dict[str, Any]) -> str:
    """What is compared of a row."""
    return f"{row['text']}\n{row.get('text_pair') or ''}"


def class_of(row: dict[str, Any]) -> str:
    return str(row["label"])


def check_rows(rows: Any, labels: Sequence[str], where: str) -> None:
    """Raise UserError for a row without a text or with another class, by its number; in a draw it has another."""
    numbers = {name: number for number, name in enumerate(labels)}
    for place, row in enumerate(rows):
        named = f"{where}: row {place + 1}"
        words_of(row, "text", named)
        number_of_class(row["label"], numbers, "label", named)


class Pool:
    """Labelled rows to draw from; none has the words of an earlier one, nor of a row that is measured on.

    Args:
        rows: a `datasets.Dataset` with text and label.
        measured: rows that are measured on; None for none.
        near_threshold: Jaccard similarity from which a row is too much like one that is measured on.
    """

    def __init__(self, rows: Any, measured: Any, near_threshold: float) -> None:
        self.rows, self._threshold = rows, near_threshold
        self._index = NearIndex(near_threshold, "strategy.options.near_threshold")
        seen = set()
        for row in measured or ():
            seen.add(_compared_words(row))
            self._index.add(len(self._index), self._sketch(row))
        self._places: dict[str, list[int]] = {}
        for place in distinct(rows, seen):
            self._places.setdefault(class_of(rows[place]), []).append(place)

    def draw(self, labels: Sequence[str], shots: int, seed: int) -> list[int]:
        """Places of `shots` rows of each class, class by class; the same for the same seed.

        Raises:
            UserError: a class has too few.
        """
        found: list[int] = []
        drawn = NearIndex(self._threshold, "strategy.options.near_threshold")
        for label in labels:
            places = list(self._places.get(label, ()))
            random.Random(f"{seed} {label}").shuffle(places)
            taken: list[int] = []
            for place in places:
                if len(taken) == shots:
                    break
                sketch = self._sketch(self.rows[place])
                if not self._index.alike(sketch) and not drawn.alike(sketch):
                    drawn.add(place, sketch)
                    taken.append(place)
            if len(taken) < shots:
                raise UserError(
                    f"strategy.options.shots: expected at most {len(taken)}, the different rows of class {label!r} "
                    f"that are not measured on, got {shots}"
                )
            found += taken
        return found

    @property
    def labels(self) -> list[str]:
        """Classes that have rows."""
        return sorted(self._places)

    def all_of(self, label: str) -> list[int]:
        """Places of all rows of a class."""
        return list(self._places.get(label, ()))

    def _sketch(self, row: dict[str, Any]) -> Sketch:
        return self._index.sketch(runs_of(_compared_words(row), WORDS))


def distinct(rows: Any, seen: Iterable[tuple[str, ...]] = ()) -> list[int]:
    """Places of the rows whose words no earlier row has, nor any of `seen`."""
    known, found = set(seen), []
    for place, row in enumerate(rows):
        if (words := _compared_words(row)) not in known:
            known.add(words)
            found.append(place)
    return found


def held_back(rows: Any, count: int, seed: int, key: str) -> tuple[list[int], list[int]]:
    """(the rest, `count` rows), places of distinct rows with each class in its share.

    Raises:
        UserError: they cannot be divided so.
    """
    from sklearn.model_selection import train_test_split

    places = distinct(rows)
    classes = [class_of(rows[place]) for place in places]
    try:
        rest, held = train_test_split(places, test_size=count, random_state=seed, stratify=classes)
    except ValueError as error:
        counts = ", ".join(f"{name} {number}" for name, number in sorted(Counter(classes).items()))
        raise UserError(
            f"{key}: expected rows that can be divided with each class in its share, got {count} to hold back of "
            f"{counts}: {error}"
        ) from error
    return list(rest), list(held)


def _compared_words(row: dict[str, Any]) -> tuple[str, ...]:
    text = text_of(row)
    return tuple(compared_words(text)) or (text,)  # signs alone
