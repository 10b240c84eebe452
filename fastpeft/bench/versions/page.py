"""The record as a table of the documentation: one row a leg."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten

from ..records import Record
from .legs import FLOORS, names
from .running import outcome


def versions_table(records: Sequence[Record]) -> str:
    """Versions and counts of tests, one row a leg and a torch, what failed as footnotes; legs without a record are "not
    run".

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("records: expected some of legs, got none")
    columns = ["torch", "triton", *FLOORS]
    rows = [f"| leg | {' | '.join(columns)} | passed | failed | skipped |", "|---" * (len(columns) + 4) + "|"]
    notes: list[str] = []
    known = {name: [record for record in records if record.case == name] for name in names()}
    for name, found in known.items():
        if not found:
            said = "not run, or no such release" if name.endswith("middle") else "not run"
            rows.append(f"| {name} |{'  |' * len(columns)} {said} |  |  |")
        rows += [_row(record, columns, notes) for record in found]
    dates = sorted(record.environment.date[:10] for record in records)
    days = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    devices = "; ".join(dict.fromkeys(record.environment.device for record in records))
    ran = sum(map(bool, known.values()))
    where = f"{ran} of {len(known)} legs; {devices}; {days}; `make versions`."
    listed = [f"- [{number}] {words}" for number, words in enumerate(notes, 1)]
    return "\n".join([*rows, "", *listed, *([""] if listed else []), where])


def _row(record: Record, columns: Sequence[str], notes: list[str]) -> str:
    found, have = outcome(record), record.environment.versions
    cells = [record.case, *(have.get(name, "") for name in columns)]
    said = "; ".join(found.failed) or found.reason
    number = ""
    if said:
        words = shorten(said, 400, placeholder=" ...").replace("|", "\\|")
        notes += [] if words in notes else [words]
        number = f" [{notes.index(words) + 1}]"
    if found.state != "ran":
        return f"| {' | '.join(cells)} | {found.state}{number} |  |  |"
    failed = f"**{len(found.failed)}**{number}" if found.failed else "0"
    return f"| {' | '.join(cells)} | {found.passed} | {failed} | {found.skipped} |"
