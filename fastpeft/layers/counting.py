"""What became of a replaced module's calls, for the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

DENSE = "a mask of queries x keys"
"""Outcome of a call of attention that the op served, in more memory than others take."""
_COUNTED = ("fastpeft_calls", "fastpeft_turns")
"""Attributes in which modules count their calls."""


class Counting:
    """Counts calls by outcome in the instance attribute `fastpeft_calls`; not while torch.compile traces."""

    fastpeft_calls: dict[str, int]

    def _count(self, outcome: str) -> None:
        if not torch.compiler.is_compiling():
            calls: dict[str, int] = self.__dict__.setdefault("fastpeft_calls", {})
            calls[outcome] = calls.get(outcome, 0) + 1


def count(module: Any, outcome: str) -> None:
    """One call more of this outcome, where calls of the module are counted."""
    if torch.compiler.is_compiling():
        return
    calls: dict[str, int] | None = getattr(module, "__dict__", {}).get("fastpeft_calls")
    if calls is not None:
        calls[outcome] = calls.get(outcome, 0) + 1


def outcomes(module: Any, name: str = "fastpeft_calls") -> tuple[int, dict[str, int]]:
    """(all calls so far, those that the op did not serve, by reason); they are counted in the attribute `name`."""
    calls: dict[str, int] = dict(getattr(module, name, {}))
    total, _ = sum(calls.values()), calls.pop("fused", 0)
    return total, calls


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """Within it, calls of a model's modules and losses without logits count for nothing."""
    calls = [(module, name, module.__dict__.get(name)) for module in model.modules() for name in _COUNTED]
    losses = [module.__dict__["fastpeft_loss"] for module in model.modules() if "fastpeft_loss" in module.__dict__]
    outcomes = [(loss, loss.outcomes) for loss in losses]
    for module, name, before in calls:
        if before is not None:
            module.__dict__[name] = dict(before)
    for loss, counted in outcomes:
        loss.outcomes = dict(counted)
    try:
        yield
    finally:
        for module, name, before in calls:
            if before is not None:
                module.__dict__[name] = before
            else:
                module.__dict__.pop(name, None)
        for loss, counted in outcomes:
            loss.outcomes = counted
