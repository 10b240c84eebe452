"""Records as rows: what was measured of several peers in the same rounds, with ratios and the share of the ceiling."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..reading import AGAIN, kind_of, least_seconds, numeric, setting, time_ratio
from ..records import Environment, Record

OURS = "fastpeft"
FLOORS = ("copy", "frozen products", "frozen layer", "one adapter")
"""Measured beside the peers as what they are held against: no rivals."""
ABSENT = ("left out", "refused")
"""Metrics of a peer that has no figure; settings["reason"] says why."""
MARKS = (*ABSENT, "passed", "served")
RAW = ("kernels", "tiles", "tuning", "check", "matrix", "versions")
"""Suites of which reports say only how much there is: proofs, every candidate of a choice, tables of coverage."""


@dataclass(frozen=True)
class Run:
    """One process that measured. `machine` is the folder its file lies in."""

    machine: str
    file: str
    environment: Environment = field(hash=False)  # a dict is in it; equality still compares all

    @property
    def date(self) -> str:
        return self.environment.date


@dataclass(frozen=True)
class What:
    """What one row says, whoever measured it. Rows of two runs with the same What measure the same.

    `beside` is settings["beside"]: a peer that had rounds of its own with another.
    """

    device: str
    suite: str
    op: str
    case: str
    direction: str
    dtype: str
    metric: str
    beside: str = ""

    @property
    def name(self) -> str:
        """The case, with the direction and the dtype where its words leave them out."""
        words = (self.direction, self.dtype, self.beside and f"beside {self.beside}")
        return ", ".join([self.case, *(word for word in words if word and word not in self.case)])

    @property
    def label(self) -> str:
        """The name, with the metric where that is not plain time or speed."""
        return self.name if self.metric in ("time", "step time", "speed") else f"{self.name}, {self.metric}"


@dataclass(frozen=True)
class Row:
    """One figure of one or more peers, from one run.

    Attributes:
        what, run: see there.
        peers: by name, in the order in which they were measured; second measurements are in `again`.
        again: second measurements, by the name of the peer.
        ceilings: best "rate" of the machine's copy and matrix products, by case, of the same run.
    """

    what: What
    run: Run
    peers: dict[str, Record]
    again: dict[str, Record]
    ceilings: Mapping[str, float]

    @property
    def kind(self) -> str | None:
        return kind_of(next(iter(self.peers.values())))

    @property
    def unit(self) -> str:
        return next(iter(self.peers.values())).unit

    @property
    def rivals(self) -> list[str]:
        return [name for name in self.peers if not is_ours(name) and name not in FLOORS]

    def ratio(self, peer: str) -> float | None:
        """fastpeft's figure over that peer's; None where either is missing or not above 0, and of plain numbers."""
        return same_rounds(self.peers.get(OURS), self.peers.get(peer)) if self.kind else None

    def best(self) -> str | None:
        """The rival that comes out best beside fastpeft."""
        ratios = {name: value for name in self.rivals if (value := self.ratio(name)) is not None}
        if not ratios:
            return None
        return (min if self.kind == "rate" else max)(ratios, key=lambda name: ratios[name])

    def noise(self) -> dict[str, float]:
        """Each second measurement of a peer over its first."""
        both = {name: same_rounds(again, self.peers.get(name)) for name, again in self.again.items()}
        return {name: value for name, value in both.items() if value is not None}

    def share_of_ceiling(self, peer: str) -> float | None:
        """The least time the machine needs for the operations and bytes of the case, over the peer's; None: unknown."""
        record = self.peers.get(peer)
        if record is None or self.kind != "time" or record.median <= 0:
            return None
        floor = floor_seconds(record, self.ceilings)
        return floor / (record.median * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[record.unit]) if floor else None


def is_ours(peer: str) -> bool:
    return peer == OURS or peer.startswith((f"{OURS} ", f"{OURS},"))


def same_rounds(ours: Record | None, theirs: Record | None) -> float | None:
    """The median of the ratios of each round; of two medians where the numbers of rounds differ."""
    if ours is None or theirs is None or min(*ours.samples, *theirs.samples) <= 0:
        return None
    same = len(ours.samples) == len(theirs.samples)
    return time_ratio(ours, theirs) if same else ours.median / theirs.median


def floor_seconds(record: Record, ceilings: Mapping[str, float]) -> float | None:
    """`least_seconds` of a record at the rates of the same run; None where they are not known."""
    flops, moved = (numeric(record, name) or 0.0 for name in ("flops", "bytes"))
    matrix, copy = ceilings.get(f"matrix {setting(record, 'dtype')}", 0.0), ceilings.get("copy", 0.0)
    return least_seconds(flops, moved, matrix, copy)


def rows(files: Mapping[str, Iterable[Record]]) -> list[Row]:
    """All figures of records, in their order; of a peer measured twice in one run under one name, the last.

    Args:
        files: records by file, as `fastpeft.bench.reading.read` gives them; RAW suites and ceilings are passed over,
            and so is what is no time, memory or rate, unless several peers have it.
    """
    found: dict[tuple[str, str, What], Row] = {}
    for run, records in runs(files):
        ceilings = {r.case: max(r.samples) for r in records if r.op == "ceiling" and r.metric == "rate"}
        for record in records:
            if record.suite in RAW or record.op == "ceiling" or record.metric in MARKS:
                continue
            what = what_of(record)
            row = found.setdefault((run.file, run.date, what), Row(what, run, {}, {}, ceilings))
            if record.peer.endswith(AGAIN):
                row.again[record.peer.removesuffix(AGAIN)] = record
            else:
                row.peers[record.peer] = record
    return [row for row in found.values() if row.peers and len(row.peers) > (row.kind is None)]


def what_of(record: Record) -> What:
    device = record.environment.device
    words = (setting(record, "direction"), setting(record, "dtype"), record.metric)
    return What(device, record.suite, record.op, record.case, *words, setting(record, "beside"))


def runs(files: Mapping[str, Iterable[Record]]) -> list[tuple[Run, list[Record]]]:
    """The records of each process that measured, in the order of files and of dates."""
    found: dict[tuple[str, str, str], tuple[Run, list[Record]]] = {}
    for file, records in files.items():
        machine = file.rpartition("/")[0]
        for record in records:
            where = record.environment
            key = (file, where.date, where.device)
            found.setdefault(key, (Run(machine, file, where), []))[1].append(record)
    return [found[key] for key in sorted(found)]


def newest(every: Iterable[Row]) -> list[Row]:
    """Of rows that measure the same, the one of the last date; the others are history."""
    last: dict[What, Row] = {}
    for row in every:
        if row.what not in last or row.run.date >= last[row.what].run.date:
            last[row.what] = row
    return list(last.values())
