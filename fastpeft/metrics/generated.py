"""How well generated texts match references: exactly, by words, by runs of characters."""

from __future__ import annotations

from collections import Counter
from typing import Any

ORDER = 6
"""Characters of chrF's longest runs."""
BETA = 2
"""How much more recall counts than precision in chrF."""


def exact(guessed: str, true: str) -> float:
    """1 if the texts are the same, white space aside."""
    return float(guessed.split() == true.split())


def word_f1(guessed: str, true: str) -> float:
    """F1 of the words that both have, case aside, as often as both have them (SQuAD's, Rajpurkar et al. 2016)."""
    first, second = Counter(guessed.casefold().split()), Counter(true.casefold().split())
    if not first or not second:
        return float(first == second)
    return 2 * sum((first & second).values()) / (sum(first.values()) + sum(second.values()))


def chrf_counts(guessed: str, true: str) -> list[int]:
    """What `chrf` adds up: for each length of runs how many `guessed` has, `true` has, and both have."""
    first, second = ("".join(text.split()) for text in (guessed, true))
    found = []
    for length in range(1, ORDER + 1):
        ours, theirs = _runs(first, length), _runs(second, length)
        found += [sum(ours.values()) if theirs else 0, sum(theirs.values()), sum((ours & theirs).values())]
    return found


def chrf(counts: Any) -> float:
    """chrF (Popović 2015), 0 to 100, of all texts together, as sacrebleu has it.

    Args:
        counts: (rows, 3 * ORDER), of `chrf_counts`.
    """
    import numpy as np

    ours, theirs, both = np.asarray(counts).sum(axis=0).reshape(ORDER, 3).T
    there = (ours > 0) & (theirs > 0)
    if not there.any():
        return 0.0
    precision, recall = (float(np.mean(both[there] / of[there])) for of in (ours, theirs))
    if precision + recall == 0:
        return 0.0
    return 100 * (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)


def _runs(text: str, length: int) -> Counter[str]:
    return Counter(text[start : start + length] for start in range(len(text) - length + 1))
