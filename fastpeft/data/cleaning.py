"""Texts without duplicates, and without what the evaluation has."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple
from uuid import uuid4

from fastpeft.errors import UserError

from .encoding import in_temporary_files
from .near import NearIndex, runs_of

BLANK_LINES = re.compile(r"\n[ \t\r]*\n\s*")
WORD = re.compile(r"\w+")
SHORT = 13
"""Paragraphs of fewer words stay whatever they repeat: headings and lines of a dialogue do."""
OVERLAP = 13
"""Words in a row that count as an overlap, as GPT-3's authors chose (arXiv 2005.14165, appendix C)."""
SHINGLE = 5
MOST_NEAR = 1_000_000
"""Texts that near duplicates are looked for among: a signature and its entries in the index take about 6 kB."""


class Removed(NamedTuple):
    """`removed` of `units` (texts, or paragraphs of documents) were taken out."""

    removed: int
    units: int


def compared_words(text: str) -> list[str]:
    """In lower case, without punctuation: what texts are compared by."""
    return WORD.findall(text.lower())


def paragraphs(text: str) -> list[str]:
    """The parts between blank lines."""
    return BLANK_LINES.split(text)


def without(rows: Any, document: bool, unwanted: Callable[[str], bool]) -> tuple[Any, Removed]:
    """Rows without the texts, or documents without the paragraphs, that are unwanted.

    The rows go through a temporary file, a row at a time.

    Args:
        rows: a `datasets.Dataset` with the column text.
        document: rows are whole texts, judged paragraph by paragraph, but for those of fewer than SHORT words.
        unwanted: called with each text or paragraph in their order.
    """
    count = units = 0

    def judged(unit: str) -> bool:
        nonlocal count, units
        units += 1
        drop = not (document and len(compared_words(unit)) < SHORT) and unwanted(unit)
        count += drop
        return not drop

    def keep(row: dict[str, Any]) -> dict[str, Any]:
        text = row["text"]
        if not isinstance(text, str):  # which encoding refuses, and names
            return {"text": text, "kept": True}
        parts = paragraphs(text) if document else [text]
        kept = [part for part in parts if judged(part)]
        text = text if len(kept) == len(parts) else "\n\n".join(kept)
        return {"text": text, "kept": any(part.strip() for part in kept) or not any(part.strip() for part in parts)}

    with in_temporary_files():  # `datasets` would pickle all that `unwanted` remembers to name the result
        held = 1 if document else 1000  # in memory, before they are written: a document may have any length
        marked = rows.select_columns("text").map(keep, new_fingerprint=uuid4().hex[:16], writer_batch_size=held)
        left = marked if count == 0 else marked.filter(lambda kept: kept, input_columns="kept")
    return left.remove_columns("kept"), Removed(count, units)


def repeats(kind: Literal["exact", "near"], threshold: float, key: str) -> Callable[[str], bool]:
    """Whether a text came before: with the same words, or nearly the same.

    Args:
        kind: near finds exact ones too.
        threshold: of the Jaccard similarity of sets of SHINGLE words in a row, as MinHash estimates it
            (Broder 1997; standard error 0.035 at 0.8).
        key: the configuration's name of this, for messages.

    Raises:
        UserError: by what is returned, at more than MOST_NEAR texts.
        MissingExtraError: datasketch is not installed.
    """
    return _Exact() if kind == "exact" else _Near(threshold, key)


class _Exact:
    """Holds 16 bytes of each text's SHA-256 (about 150 bytes of memory)."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, text: str) -> bool:
        digest = hashlib.sha256(" ".join(compared_words(text)).encode()).digest()[:16]
        known = digest in self._seen
        self._seen.add(digest)
        return known


class _Near:
    def __init__(self, threshold: float, key: str) -> None:
        self._exact, self._key = _Exact(), key
        self._index = NearIndex(threshold, key, whole=False)

    def __call__(self, text: str) -> bool:
        if self._exact(text):
            return True
        words = compared_words(text)
        if len(words) < SHINGLE:
            return False
        sketch = self._index.sketch(runs_of(words, SHINGLE))
        if self._index.alike(sketch):
            return True
        if len(self._index) == MOST_NEAR:
            raise UserError(f"{self._key}: expected at most {MOST_NEAR:,} texts or paragraphs for near, got more")
        self._index.add(len(self._index), sketch)
        return False


def overlaps(texts: Iterable[str]) -> Callable[[str], bool]:
    """Whether a text has OVERLAP words in a row that one of `texts` has, or is one of these.

    Holds 8 bytes of a hash of each run of words in `texts` (about 100 bytes of memory).
    """
    runs: set[bytes] = set()
    for text in texts:
        words = compared_words(text)
        runs.update(map(_digest, runs_of(words, OVERLAP)))

    def overlap(text: str) -> bool:
        return any(_digest(run) in runs for run in runs_of(compared_words(text), OVERLAP))

    return overlap


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
