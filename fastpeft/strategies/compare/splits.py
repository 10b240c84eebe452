"""Rows without twins, in three parts that share none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastpeft.data.dividing import divided
from fastpeft.data.encoded import Encoded
from fastpeft.data.near import NearIndex, runs_of
from fastpeft.errors import UserError

SHINGLE = 3
"""Tokens of a shingle: two rows are as alike as the sets of their shingles."""


@dataclass(frozen=True)
class Splits:
    """Parts of the data; no two rows of any of them are near twins.

    Attributes:
        train, validation, test: to learn from, to choose learning rates by, to be looked at once.
        exact: rows left out because another has the same tokens.
        near: rows left out because another is alike.
        ambiguous: of both, how many had another label or answer than the row that was kept; 0 for texts.
        unused: rows that no part needed.
    """

    train: Encoded
    validation: Encoded
    test: Encoded
    exact: int
    near: int
    ambiguous: int
    unused: int

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of each part's tokens and labels, in their order."""
        return {name: getattr(self, name).fingerprint() for name in ("train", "validation", "test")}


def split(rows: Encoded, sizes: tuple[int, int, int], similarity: float, seed: int, task: str) -> Splits:
    """Leave out twins, then draw three parts, with each class in its share where a row has one.

    Twins are told by the tokens that the model sees, so two long texts with the same beginning are twins once both are
    cut there; by a decoder's without those that all rows begin with, such as a system message. Of a group the first row
    stays.

    Args:
        rows: encoded.
        sizes: rows of the training, validation and test parts, at the most for the first.
        similarity: Jaccard similarity of the shingles from which rows are twins; above 0, at most 1.
        seed: of the draw.
        task: of the model.

    Raises:
        UserError: too few rows are left, or a class has fewer than three.
        MissingExtraError: datasketch or scikit-learn is missing.
    """
    tokens: list[list[int]] = list(rows.rows["input_ids"])
    labels: list[Any] = [None] * len(rows)
    if task == "causal-lm":
        common = _common(tokens)
        tokens = [row[common:] for row in tokens]
    elif "labels" in rows.rows.column_names:
        labels = list(rows.rows["labels"])
    kept, exact, near, ambiguous = without_twins(tokens, labels, similarity)
    classes = labels if all(isinstance(label, int) for label in labels) else None
    train, validation, test = sizes
    few = 2 * len(set(classes)) if classes else 2
    least = validation + test + few
    if len(kept) < least:
        raise UserError(
            f"data.path: expected at least {least} different rows for {validation} of validation and {test} of test "
            f"beside those to learn from, got {len(kept)} ({exact} were repeated and {near} nearly so)"
        )
    rest, tested = _drawn(kept, classes, test, seed)
    rest, validated = _drawn(rest, classes, validation, seed)
    unused: list[int] = []
    if len(rest) - train >= few // 2:
        unused, rest = _drawn(rest, classes, train, seed)
    elif len(rest) > train:
        unused, rest = rest[train:], rest[:train]
    learned, chosen, judged = (rows.part(places) for places in (rest, validated, tested))
    return Splits(learned, chosen, judged, exact, near, ambiguous, len(unused))


def _common(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)
    return next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))


def without_twins(
    tokens: Sequence[Sequence[int]], labels: Sequence[Any], similarity: float
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


def _drawn(places: list[int], classes: Sequence[int] | None, count: int, seed: int) -> tuple[list[int], list[int]]:
    """(the rest, `count` of them), each class in its share."""
    theirs = None if classes is None else [classes[place] for place in places]
    rest, drawn = divided(len(places), count, seed, "data.path", theirs)
    return [places[i] for i in rest], [places[i] for i in drawn]
