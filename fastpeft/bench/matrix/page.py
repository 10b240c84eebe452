"""The record as a table of the documentation: one row a family, reasons as footnotes."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten

from ..bases import LLM_INT8
from ..reading import versions
from ..records import Record
from .cells import BASES, CHOSEN, EXPERTS, MODES, Cell, cells
from .families import FAMILIES
from .kept import COMPARED, PACKAGES, cell_of, equal

_SHORT = {"LoRA, two active adapters": "two adapters", EXPERTS: "experts too"}


def matrix_table(records: Sequence[Record]) -> str:
    """Counts of served adapter layers, one row a family, one column a base and method, with reasons and versions.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("records: expected some of the matrix, got none")
    found = {cell_of(record): record for record in records}
    notes: dict[str, int] = {}

    def number(reason: str) -> str:
        words = shorten(reason, 160, placeholder=" ...").replace("|", "\\|")
        return f"[{notes.setdefault(words, len(notes) + 1)}]"

    def one(cell: Cell) -> str:
        record = found.get(cell)
        if record is None:
            return "not run"
        said = record.settings
        if record.metric == "refused":
            return f"no {number(said['reason'])}"
        if record.metric != COMPARED:
            return f"**{record.metric}** {number(said['reason'])}"
        words = f"{said['fused']}/{said['layers']}"
        if not equal(record):
            far = f"{said['worst']}: further from fp64 than its budget"
            words = f"**{words}** {number(far)}"
        return " ".join([words, *(number(f"fastpeft: {reason}") for reason in said["reasons"])])

    columns = [*((base, method) for base in BASES for method in CHOSEN)]
    columns.insert(len(CHOSEN), (BASES[0], EXPERTS))
    names = [f"{base}, {_SHORT.get(method, method)}" for base, method in columns]
    rows = [f"| family | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for kind in dict.fromkeys(family.kind for family in FAMILIES.values()):
        for name in (name for name, family in FAMILIES.items() if family.kind == kind):
            all_of = set(cells(name))
            line = []
            for base, method in columns:
                three = [one(cell) for mode in MODES if (cell := Cell(name, base, method, mode)) in all_of]
                line.append(three[0] if len(set(three)) == 1 else "; ".join(three))
            rows.append(f"| `{name}`, {kind} | {' | '.join(line)} |")
    numbered = [f"- [{i}] {words}" for words, i in notes.items()]
    return "\n".join([_summary(found), "", *rows, "", *numbered, "", _environments(records)])


def _summary(found: dict[Cell, Record]) -> str:
    every = [cell for name in FAMILIES for cell in cells(name)]
    known = [found[cell] for cell in every if cell in found]
    compared = [record for record in known if record.metric == COMPARED]
    layers, fused = (sum(record.settings[key] for record in compared) for key in ("layers", "fused"))
    absent = sum(record.metric == "refused" for record in known)
    bad = len(known) - len(compared) - absent
    return (
        f"{len(FAMILIES)} families, {len(every)} cells. {len(compared)} were compared: loss and every gradient are "
        f"within the budget in {sum(map(equal, compared))} of them, and an op serves {fused} of their {layers} adapter "
        f"layers. {absent} cannot exist, {bad} fail, {len(every) - len(known)} were not run."
    )


def _environments(records: Sequence[Record]) -> str:
    stamps = dict.fromkeys((r.environment.device, versions(r.environment, PACKAGES)) for r in records)
    dates = sorted({record.environment.date[:10] for record in records})
    where = "; ".join(f"{device}; {names}" for device, names in stamps)
    return (
        f"{where}; {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}; `make matrix`. {LLM_INT8}: bitsandbytes' int8."
    )
