"""docs/benchmarks.md: the newest figures of every case, a table for each run, the same text for the same records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from ..records import Record
from .figures import Figure
from .growth import SUITE, Growth
from .notes import left_out, raw
from .rows import Row, newest
from .sections import section
from .text import markdown, number, table

HEAD = """<!-- Made by `python -m benchmarks report` from the records in benchmarks/results/. Do not edit. -->
# Benchmarks

Every figure here comes from the records in `benchmarks/results/`, by `python -m benchmarks report`: for each case the
newest measurement, whoever it favours. [All measurements](assets/benchmarks/index.html), older ones too, are in one
table to sort and filter. What was learned from them is told under [Measurements](measured.md).

How to read a table:

- A row is one case. A peer's cell is its median and, in brackets, **fastpeft's figure over that peer's**: the median of
  the ratios of the same round. Under 1 fastpeft is ahead in time, over 1 in speed.
- *fastpeft / best* is the same beside the best other peer of the row, which it names.
- *again* is a peer's second measurement over its first, in the same rounds. What lies within it is noise.
- *ceiling* is the time that the case's operations and bytes take at the rates of a matrix product and of a copy,
  measured in the same run, over fastpeft's time; it is left out where that run measured no rates.
- Memory is in the order of the peers' columns; "-" is not measured.

`python -m benchmarks compare A B` says what got worse between two files or folders of records, and exits with 1 if a
figure did by more than the noise.
"""


def page(
    files: Mapping[str, Sequence[Record]], every: Sequence[Row], pictures: Sequence[Figure], growths: Sequence[Growth]
) -> str:
    """The whole page.

    Args:
        files: records by file, as `fastpeft.bench.reading.read` gives them.
        every: `rows.rows` of them.
        pictures: to be shown before the tables of their device and op.
        growths: `growth.growths` of them.
    """
    shown = sorted(newest(every), key=_order)
    parts = [HEAD]
    for device, here in groupby(shown, key=lambda row: row.what.device):
        parts.append(f"## {markdown(device)}")
        for (op, suite), those in groupby(here, key=lambda row: (row.what.op, row.what.suite)):
            if suite == SUITE:
                continue
            parts.append(f"### {markdown(op)}" + f" ({markdown(suite)})" * (suite != op))
            parts += [each.as_markdown() for each in pictures if each.place == (device, suite, op)]
            parts += section(list(those))
        parts += _growth(device, pictures, growths)
        parts += left_out(device, files)
        parts += raw(device, files)
    return "\n\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


def _order(row: Row) -> tuple[object, ...]:
    what = row.what
    return (row.run.environment.device_type != "cuda", what.device, what.op, what.suite)


def _growth(device: str, pictures: Sequence[Figure], growths: Sequence[Growth]) -> list[str]:
    lines = [line for line in growths if line.run.environment.device == device]
    if not lines:
        return []
    cells = []
    for line in lines:
        rest = ", ".join(f"{name} {value}" for name, value in line.rest)
        (first, low), (last, high) = line.points[0], line.points[-1]
        words = (f"{line.op}: {line.metric}, {line.unit}", rest, line.peer, line.axis)
        power = f"{line.fit.exponent:.2f} ({line.fit.least:.2f} to {line.fit.most:.2f})" if line.fit else ""
        cells.append([*map(markdown, words), f"{first:g} to {last:g}", f"{number(low)} to {number(high)}", power])
    head = ("figure", "settings", "peer", "against", "from, to", "figure there", "grows with the power")
    return [
        "### Growth with one setting",
        *(each.as_markdown() for each in pictures if each.place[:2] == (device, SUITE)),
        table(head, cells),
        "The power is fitted by least squares in logarithms; in brackets the least and the largest between neighbours.",
    ]
