"""Rows without twins, in three parts that share none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastpeft.data.dividing import divided
from fastpeft.data.encoded import fingerprint
from fastpeft.data.near import NearIndex, runs_of
from fastpeft.errors import UserError

SHINGLE = 3
"""Tokens of a shingle: two rows are as alike as the sets of their shingles."""


@dataclass(frozen=True)
class Splits:
    """Parts of the data, as `datasets.Dataset`s of encoded rows; no two rows of any of them are near twins.

    Attributes:
        train, validation, test: to learn from, to choose learning rates by, to be looked at once.
        exact: rows left out because another has the same tokens.
        near: rows left out because another is alike.
        ambiguous: of both, how many had another label than the row that was kept.
        unused: rows that no part needed.
    """

    train: Any
    validation: Any
    test: Any
    exact: int
    near: int
    ambiguous: int
    unused: int

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of each part's tokens and labels, in their order."""
        return {name: fingerprint(getattr(self, name)) for name in ("train", "validation", "test")}


def split(rows: Any, sizes: tuple[int, int, int], similarity: float, seed: int) -> Splits:
    """Leave out twins, then draw three parts with each class in its share.

    Twins are told by the tokens that the model sees, so two long texts with the same beginning are twins once both are
    cut there. Of a group the first row stays.

    Args:
        rows: encoded, with input_ids and labels.
        sizes: rows of the training, validation and test parts, at the most for the first.
        similarity: Jaccard similarity of the shingles from which rows are twins; above 0, at most 1.
        seed: of the draw.

    Raises:
        UserError: too few rows are left, or a class has fewer than three.
        MissingExtraError: datasketch or scikit-learn is missing.
    """
    labels = list(rows["labels"])
    kept, exact, near, ambiguous = without_twins(rows["input_ids"], labels, similarity)
    train, validation, test = sizes
    least = validation + test + 2 * len(set(labels))
    if len(kept) < least:
        raise UserError(
            f"data.path: expected at least {least} different rows for {validation} of validation and {test} of test "
            f"beside those to learn from, got {len(kept)} ({exact} were repeated and {near} nearly so)"
        )
    rest, tested = _drawn(kept, labels, test, seed)
    rest, validated = _drawn(rest, labels, validation, seed)
    unused: list[int] = []
    if len(rest) - train >= len(set(labels)):
        unused, rest = _drawn(rest, labels, train, seed)
    elif len(rest) > train:
        unused, rest = rest[train:], rest[:train]
    chosen = (rows.select(rest), rows.select(validated), rows.select(tested))
    return Splits(*chosen, exact, near, ambiguous, len(unused))


def without_twins(
    tokens: Sequence[Sequence[int]], labels: Sequence[int], similarity: float
) -> tuple[list[int], int, int, int]:
    """(places of the rows that stay, how many went as exact twins, as near ones, how many of both had other labels).

    Candidates come from MinHash, which misses few of those well above `similarity`; each is compared exactly.
    """
    index = NearIndex(similarity, "leaving out near duplicates")
    first: dict[tuple[int, ...], int] = {}
    kept, exact, near, ambiguous = [], 0, 0, 0
    for place, row in enumerate(tokens):
        twin = first.setdefault(tuple(row), place)
        if twin != place:
            exact += 1
            ambiguous += labels[twin] != labels[place]
            continue
        sketch = index.sketch(runs_of([str(token) for token in row], SHINGLE))
        if alike := index.alike(sketch):
            near += 1
            ambiguous += labels[min(alike)] != labels[place]
            continue
        index.add(place, sketch)
        kept.append(place)
    return kept, exact, near, ambiguous


def _drawn(places: list[int], labels: Sequence[int], count: int, seed: int) -> tuple[list[int], list[int]]:
    """(the rest, `count` of them), each class in its share."""
    classes = [labels[place] for place in places]
    rest, drawn = divided(len(places), count, seed, "data.path", classes)
    return [places[i] for i in rest], [places[i] for i in drawn]
