"""Outcomes as records, and what of a committed record was lost since."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..records import Record, RecordFile
from .cells import Cell, Outcome
from .families import FAMILIES

SUITE = "matrix"
COMPARED, METRICS = "served", {"compared": "served", "none": "refused", "failed": "failed", "broken": "broken"}
PACKAGES = ("fastpeft", "torch", "transformers", "peft", "bitsandbytes")
"""Whose versions can change a cell: a record holds no others, being one of thousands."""


def keep(file: RecordFile, cell: Cell, outcome: Outcome) -> Record:
    """One record a cell; its sample is the share of adapter layers that ops serve, 0 where nothing was compared."""
    found, parity = outcome.served, outcome.parity
    settings: dict[str, Any] = {
        "family": cell.family, "class": FAMILIES[cell.family].model, "base": cell.base, "method": cell.method,
        "mode": cell.mode, "reason": outcome.reason,
    }  # fmt: skip
    settings |= {"layers": found.layers, "fused": found.fused, "reasons": list(found.reasons)}
    settings |= {"mlps": found.mlps, "fused_mlps": found.fused_mlps, "worst": parity.what if parity else ""}
    share = found.fused / found.layers if parity and found.layers else 0.0
    return file.add(
        suite=SUITE, case=str(cell), op="step", peer="fastpeft", metric=METRICS[outcome.state], unit="1",
        samples=share, settings=settings, error=parity.error if parity else None,
        budget=parity.budget if parity else None,
    )  # fmt: skip


def cell_of(record: Record) -> Cell:
    return Cell(*(record.settings[name] for name in ("family", "base", "method", "mode")))


def equal(record: Record) -> bool:
    """Compared, and within the budget."""
    return record.error is not None and record.budget is not None and record.error <= record.budget


def lost(before: Iterable[Record], now: Iterable[Record]) -> list[str]:
    """A line for each cell that was served or equal to PEFT, and is no longer, or to a smaller share."""
    earlier = {cell_of(record): record for record in before}
    pairs = [(earlier.get(cell_of(record)), record) for record in now]
    return [f"{new.case}: {words}" for old, new in pairs if old is not None and (words := _lost(old, new))]


def _lost(old: Record, new: Record) -> str:
    if old.metric != COMPARED:
        return ""
    if new.metric != COMPARED:
        return f"{new.metric}: {new.settings['reason']}"
    if equal(old) and not equal(new):
        return f"{new.settings['worst']} is off by {new.error:.1e}, budget {new.budget:.1e}"
    for kind, all_of, served in (("adapter layers", "layers", "fused"), ("MLPs", "mlps", "fused_mlps")):
        had, has = ((r.settings[served], r.settings[all_of]) for r in (old, new))
        if has[0] * max(1, had[1]) < had[0] * max(1, has[1]):
            why = "; ".join(new.settings["reasons"]) or "no reason given"
            return f"{has[0]} of {has[1]} {kind} served, {had[0]} of {had[1]} before: {why}"
    return ""
