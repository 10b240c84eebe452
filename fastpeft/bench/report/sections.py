"""The tables of one op on one device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ..reading import setting, versions
from ..records import Record
from .rows import OURS, Row, is_ours
from .text import markdown, number, ratio, table

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "unsloth", "trl", "flash-attn")
_UNIT = re.compile(r"_(us|ms|s|gb_s|tflops|mib|gib|bytes)$")  # as `fastpeft.bench.recorder` reads units of names


def section(rows: Sequence[Row]) -> list[str]:
    """Parts of Markdown: for each run and model a table of each metric of several peers, then what stands alone."""
    parts = []
    for _, those in groupby(sorted(rows, key=_same_table), key=_same_table):
        here = list(those)
        compared = sorted((row for row in here if len(row.peers) > 1), key=_metric)
        for _, of_metric in groupby(compared, key=_metric):
            parts += _tables(list(of_metric))
        alone = [row for row in here if len(row.peers) == 1]
        parts += [_figures(alone)] if alone else []
        parts.append(caption(here))
    return parts


def _metric(row: Row) -> tuple[int, str, str]:
    return (("time", "rate", "memory", None).index(row.kind), row.what.metric, row.unit)


def _same_table(row: Row) -> tuple[Any, ...]:
    where = row.run.environment
    model = setting(next(iter(row.peers.values())), "model")
    return (row.run.file, model, where.commit or "", sorted(where.versions.items()), where.driver or "")


def _tables(rows: Sequence[Row]) -> list[str]:
    """fastpeft beside the others, and where there are variants of it beside those."""
    names = sorted({name: 0 for row in rows for name in row.peers}, key=lambda name: name != OURS)
    variants = [name for name in names if is_ours(name) and name != OURS]
    tables = []
    if others := [name for name in names if name not in variants]:
        extra = {
            "fastpeft / best": [_best(row) for row in rows],
            "again": [", ".join(f"{markdown(name)} {each:.2f}" for name, each in row.noise().items()) for row in rows],
            "ceiling": [f"{share:.0%}" if (share := row.share_of_ceiling(OURS)) else "" for row in rows],
        }
        tables.append(_table(rows, others, {name: cells for name, cells in extra.items() if any(cells)}))
    if variants:
        tables.append(_table(rows, [name for name in names if is_ours(name)], {}))
    return tables


def _table(rows: Sequence[Row], columns: Sequence[str], extra: dict[str, list[str]]) -> str:
    what = rows[0].what
    metric = _UNIT.sub("", what.metric).replace("_", " ")
    body = [
        [markdown(row.what.name), *(_cell(row, name) for name in columns), *(cells[i] for cells in extra.values())]
        for i, row in enumerate(rows)
        if any(name in row.peers for name in columns)
    ]
    unit = "" if rows[0].unit == "1" else f", {markdown(rows[0].unit)}"
    return table([f"{markdown(metric)}{unit}", *map(markdown, columns), *extra], body)


def _cell(row: Row, peer: str) -> str:
    if peer not in row.peers:
        return ""
    beside = None if peer == OURS else row.ratio(peer)
    over = row.peers[peer].over_budget
    found = number(row.peers[peer].median) + ("" if beside is None else f" ({ratio(beside)})")
    return f"{found}, {over}" if over else found


def _best(row: Row) -> str:
    best = row.best()
    return f"**{ratio(row.ratio(best) or 0.0)}** {markdown(best)}" if best else ""


def _figures(rows: Sequence[Row]) -> str:
    """What has nothing beside it in its rounds: a line a case."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        figures = cases.setdefault(row.what.name, [])
        for name, record in row.peers.items():
            who = "" if name == OURS else f"{markdown(name)}: "
            metric = _UNIT.sub("", row.what.metric).replace("_", " ")
            figures.append(f"{who}{markdown(metric)} {number(record.median)} {markdown(row.unit)}")
    return table(("case", "figures"), [[markdown(case), ", ".join(figures)] for case, figures in cases.items()])


def caption(rows: Sequence[Row]) -> str:
    """Where, when, with what and how often the rows of one table were measured."""
    where = rows[0].run.environment
    records: list[Record] = [record for row in rows for record in row.peers.values()]
    timed = [row for row in rows if row.kind in ("time", "rate")] or rows
    several = [row for row in timed if len(row.peers) > 1] or timed
    counts = sorted({len(record.samples) for row in several for record in row.peers.values()})
    days = sorted({row.run.date[:10] for row in rows})
    threads = sorted({setting(record, "threads") for record in records} - {""})
    models = sorted({setting(record, "model") for record in records} - {""})
    parts = [
        f"benchmarks/results/{markdown(rows[0].run.file)}",
        f"model {markdown(', '.join(models))}" if models else "",
        _span(counts, "medians of {} rounds") if counts and counts != [1] else "each measured once",
        markdown(where.device),
        f"threads of torch: {markdown(', '.join(threads))}" if threads else "",
        *(f"{name} {markdown(value)}" for name, value in _gpu(rows).items()),
        markdown(versions(where, PACKAGES), 400),
        f"commit {markdown(where.commit[:10])}" + " with changes" * bool(where.dirty) if where.commit else "",
        _span(days),
    ]
    return f"*{'; '.join(part for part in parts if part)}*"


def _span(values: Sequence[Any], words: str = "{}") -> str:
    return words.format(markdown(" to ".join(dict.fromkeys((str(values[0]), str(values[-1]))))))


def _gpu(rows: Sequence[Row]) -> dict[str, str]:
    where = rows[0].run.environment
    found = {"driver": where.driver, "CUDA": where.cuda, "ptxas": where.ptxas}
    return {name: value for name, value in found.items() if value}
