"""What a report says, in the form in which tests ask for it, and what a report cannot say: hooks and attributes."""

from __future__ import annotations

from typing import Any

from torch import nn

import fastpeft
from fastpeft.reporting import ReportRow


def adapter_rows(model: nn.Module) -> list[ReportRow]:
    """The report's rows of adapter layers."""
    return [row for row in fastpeft.report(model).rows if row.kind == "lora"]


def mlp_rows(model: nn.Module) -> list[ReportRow]:
    """The report's rows of MLPs."""
    return [row for row in fastpeft.report(model).rows if row.kind == "mlp"]


def siblings(model: nn.Module) -> set[frozenset[str]]:
    """The names, within one parent, of the rows that the report shows as computed together."""
    groups: dict[Any, set[str]] = {}
    for row in adapter_rows(model):
        if row.partners:
            parent, _, name = row.path.rpartition(".")
            groups.setdefault((parent, row.partners), set()).add(name)
    assert all(partners == f"one of {len(names)}" for (_, partners), names in groups.items())
    return {frozenset(names) for names in groups.values()}


def notes(model: nn.Module) -> str:
    """Why PEFT served calls or layers; empty when the ops served every call of every layer."""
    return "\n".join(row.note for row in adapter_rows(model) if not row.accelerated or "by PEFT" in row.note)


def shape_of(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything about each module but its tensors' values: class, attributes, hooks."""
    return {
        path: (
            type(module),
            sorted(module.__dict__),
            *(dict(getattr(module, kind)) for kind in HOOKS if hasattr(module, kind)),
            getattr(module, "support_avx512bf16_for_cpu", None),
        )
        for path, module in model.named_modules()
    }


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
