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
  the ratios of the same round. Under 1 fastpeft is ahead in time and memory, over 1 in speed.
- *fastpeft / best* is the same beside the best other peer of the row, which it names.
- *over budget* says of a peer how many times the error that an op may have, twice PyTorch's and one rounding, it has.
- *again* is a peer's second measurement over its first, in the same rounds. What lies within it is noise.
- *ceiling* is the time that the case's operations and bytes take at the rates of a matrix product and of a copy,
  measured in the same run, over fastpeft's time; it is left out where that run measured no rates.

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
    shown = sorted((row for row in newest(every) if row.what.suite != SUITE), key=_place)
    parts = [HEAD]
    for device in _devices(files):
        sections = []
        for place, those in groupby((row for row in shown if row.what.device == device), key=_place):
            here = list(those)
            _, op, suite = place
            heading = f"### {markdown(op)}" + f" ({markdown(suite)})" * (suite != op)
            images = [each.as_markdown() for each in pictures if each.place == (device, suite, op)]
            sections.append((not any(row.best() for row in here), [heading, *images, *section(here)]))
        parts.append(f"## {markdown(device)}")
        for _, each in sorted(sections, key=lambda pair: pair[0]):  # what stands beside rivals first
            parts += each
        parts += [*_growth(device, pictures, growths), *left_out(device, files), *raw(device, files)]
    return "\n\n".join(parts).replace("\n\n\n", "\n\n") + "\n"


def _place(row: Row) -> tuple[str, str, str]:
    return (row.what.device, row.what.op, row.what.suite)


def _devices(files: Mapping[str, Sequence[Record]]) -> list[str]:
    """Names of all devices, GPUs first."""
    found = {(r.environment.device_type != "cuda", r.environment.device) for records in files.values() for r in records}
    return list(dict.fromkeys(device for _, device in sorted(found)))


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
