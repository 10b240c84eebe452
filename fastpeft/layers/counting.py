"""What became of a replaced module's calls, for the report."""

from __future__ import annotations

from typing import Any

import torch


class Counting:
    """Counts calls by outcome in the instance attribute `fastpeft_calls`; not while torch.compile traces."""

    fastpeft_calls: dict[str, int]

    def _count(self, outcome: str) -> None:
        if not torch.compiler.is_compiling():
            calls: dict[str, int] = self.__dict__.setdefault("fastpeft_calls", {})
            calls[outcome] = calls.get(outcome, 0) + 1


def outcomes(module: Any) -> tuple[int, dict[str, int]]:
    """(all calls so far, those that the op did not serve, by reason)."""
    calls: dict[str, int] = dict(getattr(module, "fastpeft_calls", {}))
    total, _ = sum(calls.values()), calls.pop("fused", 0)
    return total, calls
