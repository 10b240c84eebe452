"""Texts that are nearly the same: MinHash proposes pairs, how alike they are decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fastpeft.requirements import require

PERMUTATIONS = 128


class Sketch(NamedTuple):
    """A text as it is compared: its runs of words or tokens, and their MinHash (Broder 1997)."""

    runs: frozenset[bytes]
    minhash: Any


def runs_of(words: Sequence[str], length: int) -> list[str]:
    """Runs of `length` words; of fewer words one run of all."""
    return [" ".join(words[start : start + length]) for start in range(max(1, len(words) - length + 1))]


class NearIndex:
    """Texts under numbers of the caller's, to be asked which of them are like another.

    Locality-sensitive hashing proposes pairs, and may miss some near the threshold; it is set to miss few, since one
    that is none only costs a comparison.

    Args:
        threshold: Jaccard similarity of the sets of runs from which on texts are alike; above 0, at most 1.
        purpose: what needs it, for the message where datasketch is missing.
        whole: compare the runs themselves. Else the similarity is estimated by MinHash (standard error 0.035 at 0.8),
            which holds about 6 kB a text however long it is.

    Raises:
        MissingExtraError: datasketch is not installed.
    """

    def __init__(self, threshold: float, purpose: str, *, whole: bool = True) -> None:
        datasketch = require("train", "datasketch", purpose)
        self._threshold, self._whole = threshold, whole
        self._empty = datasketch.MinHash(num_perm=PERMUTATIONS, seed=1)
        self._index = datasketch.MinHashLSH(threshold=min(threshold, 0.95), num_perm=PERMUTATIONS, weights=(0.1, 0.9))
        self._held: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._held)

    def sketch(self, runs: Iterable[str]) -> Sketch:
        found = frozenset(run.encode() for run in runs)
        minhash = self._empty.copy()
        minhash.update_batch(found)
        return Sketch(found, minhash)

    def add(self, number: int, sketch: Sketch) -> None:
        self._index.insert(number, sketch.minhash)
        self._held[number] = sketch.runs if self._whole else sketch.minhash.hashvalues

    def alike(self, sketch: Sketch) -> list[int]:
        """Numbers of those that are, in no order."""
        candidates = self._index.query(sketch.minhash)
        return [number for number in candidates if self._similarity(sketch, self._held[number]) >= self._threshold]

    def _similarity(self, sketch: Sketch, held: Any) -> float:
        if self._whole:
            return len(sketch.runs & held) / len(sketch.runs | held)
        return float((sketch.minhash.hashvalues == held).mean())
