"""How time and memory grow with one setting: the exponent of a power, by least squares in logarithms.

A scaling suite's records have suite "scaling" and settings {"axis": "tokens", "tokens": 1024, ...}: `axis` names the
one setting that varies. Records of one run that share op, peer, metric and all other settings are a line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ..reading import AGAIN, kind_of, numeric, setting
from ..records import Record
from .rows import Run, runs

SUITE = "scaling"
_NOT_SHARED = ("flops", "bytes", "reason", "axis", "depth")


@dataclass(frozen=True)
class Fit:
    """y grows as x to the power `exponent`; between neighbours the power is `least` to `most`."""

    exponent: float
    least: float
    most: float


@dataclass
class Growth:
    """One line: a figure of one peer against one setting.

    Attributes:
        rest: the settings that all points share.
        points: (setting, median), in the order of the setting; measured twice, the later.
    """

    run: Run
    op: str
    peer: str
    metric: str
    unit: str
    kind: str
    axis: str
    rest: tuple[tuple[str, str], ...]
    points: list[tuple[float, float]] = field(default_factory=list)

    @property
    def fit(self) -> Fit | None:
        return fit(self.points)


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """Least squares of log y against log x; None with fewer than three points, or any that is not above 0."""
    if len({x for x, _ in points}) < 3 or min(min(point) for point in points) <= 0:
        return None
    logs = sorted((math.log(x), math.log(y)) for x, y in points)
    mean_x, mean_y = (sum(each) / len(logs) for each in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    slopes = [(d - b) / (c - a) for (a, b), (c, d) in pairwise(logs) if c > a]
    return Fit(sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread, min(slopes), max(slopes))


def growths(files: Mapping[str, Iterable[Record]]) -> list[Growth]:
    """Every line with two points or more, newest run of each only; second measurements of a peer are passed over."""
    last: dict[tuple[object, ...], Growth] = {}
    for run, records in sorted(runs(files), key=lambda each: each[0].date):
        lines: dict[tuple[object, ...], Growth] = {}
        for record in records:
            axis, kind = setting(record, "axis"), kind_of(record)
            x = numeric(record, axis)
            if record.suite != SUITE or not kind or x is None or record.peer.endswith(AGAIN):
                continue
            names = sorted(set(record.settings) - {axis, *_NOT_SHARED})
            rest = tuple((name, text) for name in names if (text := setting(record, name)))
            key = (record.environment.device, record.op, record.peer, record.metric, axis, rest)
            line = lines.setdefault(
                key, Growth(run, record.op, record.peer, record.metric, record.unit, kind, axis, rest)
            )
            line.points = sorted({**dict(line.points), x: record.median}.items())
        last.update({key: line for key, line in lines.items() if len(line.points) > 1})
    return list(last.values())
