"""A short table of what was measured, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..reading import median_ratio
from ..records import Record
from . import ceilings
from .case import Floor

_OURS = "fastpeft"
_HEAD = ("ms", "of ceiling", "peak MiB", "ours / it")


def table(records: Sequence[Record]) -> str:
    """For each op, case and direction a line a peer, the fastest first; empty where no time was measured.

    "of ceiling" is the time in which the machine's ceilings would let the floor be done, as a share of the time;
    "ours / it" the time of fastpeft over the peer's, median over rounds. Who is over budget is marked.
    """
    rates = {record.case: record.samples for record in records if record.op == "ceiling"}
    blocks: dict[tuple[Any, ...], dict[str, Record]] = {}
    peaks = {(_key(record), record.peer): record.median for record in records if record.metric == "peak memory"}
    for record in records:
        if record.metric == "time":
            blocks.setdefault(_key(record), {})[record.peer] = record
    rows: list[Sequence[str]] = []
    for key, times in blocks.items():
        op, case, dtype, direction = key
        rows.append((f"{op}: {case}, {dtype}, {direction}", *(_HEAD if not rows else ())))
        for peer, record in sorted(times.items(), key=lambda item: item[1].median):
            floor = Floor(record.settings["flops"], record.settings["bytes"])
            share = ceilings.share(floor, getattr(torch, dtype), record.median, rates)
            peak = f"{peaks[key, peer]:.1f}" if (key, peer) in peaks else ""
            ratio = f"{median_ratio(times[_OURS].samples, record.samples):.2f}" if _OURS in times else ""
            who = f"    {peer}" + (f" ({record.over_budget})" if record.over_budget else "")
            rows.append((who, f"{record.median:.3f}", f"{share:.0%}", peak, "" if peer == _OURS else ratio))
    width = max((len(row[0]) for row in rows), default=0)
    return "\n".join((f"{row[0]:{width}}" + "".join(f"{cell:>12}" for cell in row[1:])).rstrip() for row in rows)


def _key(record: Record) -> tuple[Any, ...]:
    return record.op, record.case, record.settings.get("dtype"), record.settings.get("direction")
