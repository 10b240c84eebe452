"""Markdown tables made from records, and put between two markers of a document.

python -m fastpeft.bench.tables benchmarks/results/cpu/steps.jsonl --into README.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from .records import Record, load

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def steps_table(records: Sequence[Record]) -> str:
    """Step time and bytes kept of fastpeft beside PEFT, one row a case, with where and with what it was measured.

    PEFT's second measurement beside its first shows the noise.

    The time ratio is the median over rounds of the two times of one round.

    Raises:
        ValueError: records of more than one environment, or none.
    """
    records = [record for record in records if record.suite == "step"]
    places = {
        (r.environment.device, r.environment.commit, tuple(sorted(r.environment.versions.items()))) for r in records
    }
    if len(places) != 1:
        raise ValueError(f"records: expected one run on one machine, got {len(places)}")
    by_key = {(r.case, r.metric, r.peer): r for r in records}
    rows = [
        "| training step | PEFT, ms | fastpeft, ms | time, fastpeft / PEFT | PEFT / itself | kept, fastpeft / PEFT |",
        "|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(r.case for r in records):
        ours, theirs = by_key[case, "step time", "fastpeft"], by_key[case, "step time", "peft"]
        again = by_key[case, "step time", "peft again"]
        time, spread = (median(a / b for a, b in zip(r.samples, theirs.samples, strict=True)) for r in (ours, again))
        kept = by_key[case, "kept for backward", "fastpeft"].median / by_key[case, "kept for backward", "peft"].median
        rows.append(f"| {case} | {theirs.median:.0f} | {ours.median:.0f} | {time:.2f} | {spread:.2f} | {kept:.2f} |")
    first = records[0]
    where = first.environment
    versions = ", ".join(f"{name} {where.versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    rounds = len(next(r for r in records if r.metric == "step time").samples)
    threads = first.settings.get("threads")
    rows += [
        "",
        f"Medians of {rounds} interleaved rounds on {where.device}, torch on {threads} of them; {versions}; "
        f"{where.date[:10]}; `make bench`. PEFT is measured twice a round: its time divided by itself, if not 1, "
        "shows the noise of the machine. Kept: bytes that a forward keeps for backward.",
    ]
    return "\n".join(rows)


def insert(text: str, table: str) -> str:
    """The document with the table between the markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"document: expected {BEGIN} and {END} once each, in this order")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpeft.bench.tables", description=__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("--into", type=Path, help="a document with the two markers; printed when not given")
    options = parser.parse_args(arguments)
    table = steps_table(load(options.records))
    if options.into is None:
        print(table)
    else:
        options.into.write_text(insert(options.into.read_text(), table))


if __name__ == "__main__":
    main()
