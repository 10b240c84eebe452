"""Texts that are nearly the same, found by MinHash and confirmed by their exact likeness."""

from __future__ import annotations

from collections.abc import Sequence

from fastpeft.requirements import require

from .checks import Sample

PERMUTATIONS = 128
WORDS = 3
"""Words of a shingle; a shorter text is one."""


def shingles(text: str) -> set[str]:
    """All runs of WORDS words."""
    words = text.split()
    return {" ".join(words[start : start + WORDS]) for start in range(max(1, len(words) - WORDS + 1))}


def likeness(first: set[str], second: set[str]) -> float:
    """Jaccard's: the share of shingles that both have among those that either has."""
    return len(first & second) / len(first | second)


def nearly_leaked(training: Sequence[Sample], evaluation: Sequence[Sample], threshold: float) -> list[int]:
    """Numbers of evaluation rows whose text is at least `threshold` like one that is trained on.

    MinHash with locality-sensitive hashing proposes pairs (it may miss some that are close to the threshold), the
    exact likeness decides.

    Args:
        threshold: above 0 and below 1.

    Raises:
        MissingExtraError: datasketch is not installed.
    """
    datasketch = require("train", "datasketch", "near duplicates")

    def sketch(parts: set[str]) -> object:
        made = datasketch.MinHash(num_perm=PERMUTATIONS, seed=1)
        made.update_batch([part.encode() for part in parts])
        return made

    index = datasketch.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    trained = [shingles(row.given) for row in training]
    for place, parts in enumerate(trained):
        index.insert(place, sketch(parts))
    found = []
    for row in evaluation:
        parts = shingles(row.given)
        if any(likeness(parts, trained[place]) >= threshold for place in index.query(sketch(parts))):
            found.append(row.number)
    return found
