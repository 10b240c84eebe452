"""What was replaced, what was not, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .applying import RETRIED, SETTINGS
from .layers.counting import Counting, outcomes
from .replacements import REPLACEMENTS, Left, Match
from .replacements.lora import FROZEN
from .replacements.swap import why_not_its_own

BY_FORWARD = ("lora", "mlp", "norms")
"""What serves a module by the forward of its class."""

NO_ADAPTER = "no layer has an adapter: attach one first, if wanted, then call fastpeft.accelerate(model) again"
"""What the report of an accelerated model says where `accelerate` found no layer of an adapter at all."""


@dataclass(frozen=True)
class ReportRow:
    """One module; a projection that has no adapters, but is computed with siblings that have some, is a row too.

    Attributes:
        path: its name in the model.
        module: its class.
        kind: what of it is replaced: the switch of `accelerate`.
        op: the op that serves it; empty when it was left alone.
        partners: with how many it is computed, empty when alone.
        note: why it was left alone, or which of its calls so far the op could not serve, and why.
    """

    path: str
    module: str
    kind: str
    op: str
    partners: str
    note: str

    @property
    def accelerated(self) -> bool:
        return bool(self.op)


@dataclass(frozen=True)
class Report:
    """All rows; prints as a table."""

    rows: tuple[ReportRow, ...]
    notes: tuple[str, ...]

    @property
    def accelerated(self) -> tuple[ReportRow, ...]:
        return tuple(row for row in self.rows if row.accelerated)

    @property
    def left(self) -> tuple[ReportRow, ...]:
        return tuple(row for row in self.rows if not row.accelerated)

    def _share(self, kind: str) -> str:
        rows = [row for row in self.rows if row.kind == kind and not row.op.startswith(FROZEN)]
        return f"{sum(row.accelerated for row in rows)} of {len(rows)}"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}

    def __str__(self) -> str:
        lines = [f"fastpeft: {self._share('lora')} adapter layers accelerated"]
        if frozen := sum(row.op.startswith(FROZEN) for row in self.rows):
            lines[0] += f", {frozen} frozen projections computed with them"
        if any(row.kind == "mlp" for row in self.rows):
            lines[0] += f", {self._share('mlp')} MLPs as one op"
        if any(row.kind == "attention" for row in self.rows):
            lines[0] += f", {self._share('attention')} attentions"
        if any(row.kind == "norms" for row in self.rows):
            lines[0] += f", {self._share('norms')} norms and rotary embeddings"
        if any(row.kind == "loss" for row in self.rows):
            lines[0] += f", {self._share('loss')} losses without logits"
        if any(row.kind == "memory" for row in self.rows):
            lines[0] += f", {self._share('memory')} layers with a memory policy"
        cells = [("module", "count", "op", "together", "note")]
        merged: Counter[tuple[str, str, str, str]] = Counter()
        for row in self.rows:
            merged[(_without_numbers(row.path), row.op or "its own forward", row.partners, row.note)] += 1
        cells += [
            (path, str(count), op, partners or "alone", note) for (path, op, partners, note), count in merged.items()
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(5)]
        if self.rows:
            lines += [
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
            ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def report(model: nn.Module) -> Report:
    """What `accelerate` did to a model, and what its layers' calls have met since.

    Args:
        model: any module; one that was never accelerated lists what could be.

    Returns:
        A `Report`; print it for a table (layers of one kind in one line), read `.rows` for every module.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    settings = next((m.__dict__[SETTINGS] for m in model.modules() if SETTINGS in m.__dict__), None)
    rows = []
    with torch.device("cpu"):  # as in `accelerate`
        for path, module in model.named_modules():
            kinds: set[str] = set()
            for replacement in REPLACEMENTS:
                row = None if replacement.switch in kinds else _row(path, module, replacement, settings)
                if row is not None:
                    rows.append(row)
                    kinds.add(row.kind)
    notes = []
    if settings is None:
        notes.append("this model was not accelerated: call fastpeft.accelerate(model)")
    else:
        waiting = [path for path, m in model.named_modules() if getattr(m, "fastpeft_watch", None) is not None]
        notes += [_waits(waiting)] if waiting else []
        notes += [] if any(row.kind == "lora" for row in rows) else [NO_ADAPTER]
    notes += [f"memory ran out: {how}" for m in model.modules() for how in m.__dict__.get(RETRIED, ())]
    return Report(tuple(rows), tuple(notes))


def _row(path: str, module: nn.Module, replacement: Any, settings: dict[str, Any] | None) -> ReportRow | None:
    name = type(module).__name__
    served = replacement.installed(module)
    if served is not None:
        if replacement.switch in BY_FORWARD and (passed := _passed_over(module)) is not None:
            return ReportRow(path, name, replacement.switch, "", "", passed.reason)
        return ReportRow(path, name, replacement.switch, served.op, *replacement.status(module))
    matched = replacement.match(module)
    if matched is None:
        return None
    if isinstance(matched, Match):
        matched = replacement.prove(module, matched)
    if isinstance(matched, Match):
        off = settings is not None and not settings.get(replacement.switch)
        matched = Left(f"{replacement.switch}=False" if off else "not accelerated yet")
    if not matched.reason:
        return None
    return ReportRow(path, name, replacement.switch, "", "", matched.reason)


def _passed_over(module: nn.Module) -> Left | None:
    """Why our forward is not reached: another was put on the instance later, and handed on none of its calls."""
    return why_not_its_own(module) if isinstance(module, Counting) and not outcomes(module)[0] else None


def _waits(paths: list[str]) -> str:
    """Some may have been called: with a cache, compiled, or by a call that failed."""
    which = paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    return f"projections that share an input are found at the first forward pass, not had yet by {which}"


def _without_numbers(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
