"""What became of a replaced module's calls, for the report."""

from __future__ import annotations

from typing import Any

import torch

DENSE = "a mask of queries x keys"
"""Outcome of a call of attention that the op served, in more memory than others take."""


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
