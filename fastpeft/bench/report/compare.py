"""Two sets of records, such as before and after a change: what got slower or larger by more than the noise.

A pair is one figure in both sets: the same suite, case, op, peer, metric, direction, dtype and device. Its ratio is
that of the medians, turned so that above 1 is worse. The bound is where 99 % of the ratios lie when the samples of both
are drawn again (bootstrap), widened by how far a peer is from itself in the same case, where it was measured twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..reading import kind_of, setting
from ..records import Record
from .rows import ABSENT, Row, What, is_ours, rows, runs, what_of

LEAST_SAMPLES = 3
DRAWS = 4000
OUTSIDE = 0.005  # of the draws, on each side of the bound
_OF_A_CASE = ("rank", "tokens", "threads", "model")


@dataclass(frozen=True)
class Pair:
    """One figure in both sets.

    Attributes:
        before, after: medians, in `unit`.
        worse: after over before for times and sizes, before over after for rates: above 1 is worse.
        bound: where `worse` may lie by the noise of both; None with fewer than three samples in either.
    """

    what: What
    peer: str
    unit: str
    before: float
    after: float
    worse: float
    bound: tuple[float, float] | None

    def regressed(self, threshold: float) -> bool:
        return self.worse > threshold and self.bound is not None and self.bound[0] > 1

    def improved(self, threshold: float) -> bool:
        return self.worse < 1 / threshold and self.bound is not None and self.bound[1] < 1

    def unknown(self, threshold: float) -> bool:
        """Past the threshold, with too few samples to say whether by noise."""
        return self.bound is None and max(self.worse, 1 / self.worse) > threshold


@dataclass
class Comparison:
    """All pairs, and what cannot be compared or should be known beside them.

    Attributes:
        gone, new: figures of one set alone.
        remarks: what differs between the places of measurement, and peers that are left out now.
    """

    pairs: list[Pair]
    gone: list[tuple[What, str]]
    new: list[tuple[What, str]]
    remarks: list[str] = field(default_factory=list)

    def to_dict(self, threshold: float) -> dict[str, Any]:
        """Plain data, for JSON."""

        def verdict(pair: Pair) -> str:
            words = {"regression": pair.regressed, "improvement": pair.improved, "unknown": pair.unknown}
            return next((word for word, holds in words.items() if holds(threshold)), "same")

        return {
            "threshold": threshold,
            "pairs": [{**asdict(pair), "verdict": verdict(pair)} for pair in self.pairs],
            "gone": [{**asdict(what), "peer": peer} for what, peer in self.gone],
            "new": [{**asdict(what), "peer": peer} for what, peer in self.new],
            "remarks": self.remarks,
        }


Figures = dict[tuple[What, str], tuple[Record, Row]]


def compare(
    before: Mapping[str, Sequence[Record]], after: Mapping[str, Sequence[Record]], peers: Iterable[str] = ()
) -> Comparison:
    """Pairs of times, rates and sizes, the worst first.

    Args:
        before, after: records by file, as `fastpeft.bench.reading.read` gives them; of figures measured more than once
            in one set, the newest.
        peers: only these; all when empty.

    Raises:
        ValueError: the two have no figure in common; says why as far as it is known.
    """
    chosen = set(peers)
    old, new = _figures(before, chosen), _figures(after, chosen)
    remarks = [*_places(before, after), *_settings(old, new), *_left_out(old, after)]
    both = [key for key in old if key in new]
    if not both:
        of_peers = f" of {', '.join(sorted(chosen))}" if chosen else ""
        why = "; ".join(remarks) or "other suites, cases or peers"
        raise ValueError(f"records: expected a figure{of_peers} that both sets have, got none: {why}")
    pairs = [pair for key in both if (pair := _pair(key, old[key], new[key]))]
    pairs.sort(key=lambda pair: -pair.worse)
    return Comparison(
        pairs, [key for key in old if key not in new], [key for key in new if key not in old], remarks + _drift(pairs)
    )


def _figures(files: Mapping[str, Sequence[Record]], peers: set[str]) -> Figures:
    found: Figures = {}
    for row in sorted((row for row in rows(files) if row.kind), key=lambda row: row.run.date):
        found.update({(row.what, name): (it, row) for name, it in row.peers.items() if not peers or name in peers})
    return found


def _pair(key: tuple[What, str], before: tuple[Record, Row], after: tuple[Record, Row]) -> Pair | None:
    (a, row_a), (b, row_b) = before, after
    if a.unit != b.unit or min(*a.samples, *b.samples) <= 0:
        return None
    if kind_of(a) == "rate":
        worse, bound = a.median / b.median, _bound(b.samples, a.samples)
    else:
        worse, bound = b.median / a.median, _bound(a.samples, b.samples)
    if bound:
        again = [value for row in (row_a, row_b) for value in row.noise().values()]
        wider = math.exp(max((abs(math.log(value)) for value in again), default=0.0))
        bound = (bound[0] / wider, bound[1] * wider)
    return Pair(*key, a.unit, a.median, b.median, worse, bound)


def _bound(lower: Sequence[float], upper: Sequence[float]) -> tuple[float, float] | None:
    """Where the ratio of the medians, upper over lower, lies in 99 % of bootstrap draws; always the same draws."""
    if min(len(lower), len(upper)) < LEAST_SAMPLES:
        return None
    import numpy as np

    random = np.random.default_rng(0)
    medians = [
        np.median(np.asarray(each)[random.integers(len(each), size=(DRAWS, len(each)))], axis=1)
        for each in (lower, upper)
    ]
    low, high = np.quantile(medians[1] / medians[0], [OUTSIDE, 1 - OUTSIDE])
    return float(low), float(high)


def _places(before: Mapping[str, Sequence[Record]], after: Mapping[str, Sequence[Record]]) -> list[str]:
    old, new = ([run.environment for run, _ in runs(files)] for files in (before, after))

    def said(name: str, a: Iterable[str | None], b: Iterable[str | None]) -> list[str]:
        first, second = ({value or "none" for value in values} for values in (a, b))
        return [f"{name}: {', '.join(sorted(first))} -> {', '.join(sorted(second))}"] if first != second else []

    packages = sorted({name for where in (*old, *new) for name in where.versions})
    remarks = []
    for name in ("device", "driver", "cuda", "ptxas", "python", "system"):
        remarks += said(name, *([getattr(where, name) for where in each] for each in (old, new)))
    for name in packages:
        remarks += said(name, *([where.versions.get(name) for where in each] for each in (old, new)))
    changed = [label for label, each in (("A", old), ("B", new)) if any(where.dirty for where in each)]
    return remarks + ([f"measured with uncommitted changes: {', '.join(changed)}"] if changed else [])


def _settings(old: Figures, new: Figures) -> list[str]:
    differ: dict[str, int] = {}
    for key in old:
        if key in new:
            for name in _OF_A_CASE:
                a, b = setting(old[key][0], name), setting(new[key][0], name)
                if a != b:
                    words = f"{name}: {a or 'none'} -> {b or 'none'}"
                    differ[words] = differ.get(words, 0) + 1
    return [f"{words} in {count} pairs" for words, count in differ.items()]


def _left_out(old: Figures, after: Mapping[str, Sequence[Record]]) -> list[str]:
    had = {(what.suite, what.op, what.case, peer) for what, peer in old}
    found: dict[str, None] = {}
    for _, records in runs(after):
        for record in records:
            what = what_of(record)
            if record.metric in ABSENT and (what.suite, what.op, what.case, record.peer) in had:
                why = record.settings.get("reason", "no reason given")
                found[f"left out now: {record.peer}, {what.op}: {what.case}: {why}"] = None
    return list(found)


def _drift(pairs: Sequence[Pair]) -> list[str]:
    """How far the others, which a change of ours leaves alone, went in the same time: the machine's own drift."""
    others = sorted(pair.worse for pair in pairs if not is_ours(pair.peer) and pair.bound)
    if not others:
        return []
    return [f"other peers' figures went by {others[len(others) // 2]:.2f} in the middle ({len(others)} pairs)"]
