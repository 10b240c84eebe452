"""What has no figure: peers that were left out and why, checks, and suites too long for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..records import Record
from .rows import ABSENT, RAW, runs, what_of
from .text import markdown, reason, table


def left_out(device: str, files: Mapping[str, Sequence[Record]]) -> list[str]:
    """A table of peers that were left out, one row a reason, of the newest run of each case."""
    last: dict[tuple[object, ...], Record] = {}
    for run, records in sorted(runs(files), key=lambda each: each[0].date):
        here: dict[tuple[object, ...], Record] = {}
        for record in records if run.environment.device == device else ():
            what = what_of(record)
            key = (what.suite, what.op, what.case, what.dtype, record.peer)
            if record.metric in ABSENT or key not in here:
                here[key] = record
        last.update(here)
    cases: dict[tuple[str, str, str], list[str]] = {}
    for record in last.values():
        if record.metric in ABSENT:
            row = (record.op, record.peer, reason(record.settings.get("reason", "no reason given")))
            cases.setdefault(row, []).append(record.case)
    if not cases:
        return []
    rows = []
    for (op, peer, why), those in sorted(cases.items()):
        several = list(dict.fromkeys(those))
        which = several[0] if len(several) == 1 else f"{several[0]} and {len(several) - 1} more"
        rows.append([markdown(op), markdown(peer), markdown(which), markdown(why)])
    return ["### Left out", table(("op", "peer", "case", "why"), rows)]


def raw(device: str, files: Mapping[str, Sequence[Record]]) -> list[str]:
    """How many checks passed when they last ran, and how much there is of what is not shown."""
    checks: dict[str, dict[str, float]] = {}
    others: dict[tuple[str, str], int] = {}
    for run, records in sorted(runs(files), key=lambda each: each[0].date):
        for record in records if run.environment.device == device else ():
            if record.metric == "passed":
                checks.setdefault(record.op, {})[record.case] = record.median
            elif record.suite in RAW:
                others[record.suite, run.file] = others.get((record.suite, run.file), 0) + 1
    parts = []
    if checks:
        rows = [
            [markdown(op), str(len(done)), str(sum(value == 1 for value in done.values()))]
            for op, done in sorted(checks.items())
        ]
        parts += ["### Checks", "Each when it last ran, in whatever version; a benchmark that ends is a check too."]
        parts.append(table(("op", "checks", "passed"), rows))
        failed = [f"{op}: {case}" for op, done in sorted(checks.items()) for case, value in done.items() if value != 1]
        parts += ["Failed: " + "; ".join(map(markdown, failed)) + "."] if failed else []
    if others:
        rows = [[markdown(suite), markdown(file), str(count)] for (suite, file), count in sorted(others.items())]
        parts += ["### Not shown", "Records of every candidate or tolerance, by file:"]
        parts.append(table(("suite", "file", "figures"), rows))
    return parts
