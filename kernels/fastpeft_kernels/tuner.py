"""Time the candidates of given cases on a device, and keep the winners. Never called by an op."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .tuning import choosing, files
from .tuning.measuring import SECONDS, Measured, Tunable, measure
from .tuning.records import UnusableError, Winner

Case = tuple[Tunable, Any]
"""An op with a choice, and a key of it."""


def tunables() -> list[Tunable]:
    """Every op with a choice. What others are made of comes first: their measurements use the winners before them."""
    from .activation import problems as activation
    from .attention import tunables as attention
    from .lora import problems as lora
    from .mlp import problems as mlp
    from .quant import problems as quant

    return [*quant.TUNABLES, *activation.TUNABLES, *attention.TUNABLES, *lora.TUNABLES, *mlp.TUNABLES]


def cases_for(met: Iterable[tuple[str, Any]], device: torch.device, tokens: Sequence[int]) -> list[Case]:
    """What is to be measured: every case that has more than one candidate on a device, in the order of `tunables`.

    Args:
        met: (op, case), as `choosing.meeting` gathers them; their numbers of tokens do not count.
        tokens: numbers of tokens for each case, rounded up to powers of two.
    """
    found = tunables()
    asked = list(met)
    cases: dict[tuple[str, Any], Case] = {}
    for tunable in found:
        if len(tunable.candidates(device)) > 1:
            for op, key in asked:
                if op == tunable.op:
                    for count in tokens:
                        there = key.at(count, device)
                        cases[op, there] = (tunable, there)
    return list(cases.values())


def tune(
    cases: Iterable[Case],
    device: torch.device,
    *,
    folder: Path | None = None,
    again: bool = False,
    seconds: float = SECONDS,
    progress: Callable[[int], None] | None = None,
) -> list[Measured]:
    """Measure cases, keep the winners, and use them in this process from now on.

    Args:
        cases: from `cases_for`.
        device: to measure on, "cuda" for the current GPU; alone, or the times are worth nothing.
        folder: where the device's file is; the user's cache folder by default.
        again: also what the file has a winner for.
        seconds: about how long each case is timed.
        progress: called after each case with how many are done.

    Returns:
        The outcomes in order, those of earlier runs too.

    Raises:
        ValueError: another kind of device than a CPU or a CUDA GPU.
        RuntimeError: while a CUDA graph is captured, or another thread tunes.
        OSError: the winners cannot be written; they are in use all the same.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected a CPU or a CUDA GPU, got {device}")
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune: cannot measure while a CUDA graph is captured")
    device = choosing.with_index(device)
    name = choosing.device_name(device)
    path = files.file_of(name, folder or files.user_folder())
    outcomes: list[Measured] = []
    try:
        with choosing.alone():
            known = {} if again else _known(path, name)
            for tunable, key in cases:
                candidates = tunable.candidates(device)
                old = known.get((tunable.op, tuple(key)))
                if old is not None and old.choice in candidates:
                    outcome = Measured(tunable.op, key, old, candidates[0], reused=True)
                else:
                    outcome = measure(tunable, key, device, seconds)
                if outcome.winner is not None:
                    choosing.learn(device, outcome.winner)
                outcomes.append(outcome)
                if progress is not None:
                    progress(len(outcomes))
    finally:  # also what was measured before an interrupt
        if fresh := [outcome.winner for outcome in outcomes if outcome.winner is not None and not outcome.reused]:
            files.add(path, name, fresh)
    return outcomes


def _known(path: Path, device: str) -> dict[tuple[str, Any], Winner]:
    try:
        return {(winner.op, winner.case): winner for winner in files.read(path, device)}
    except UnusableError:  # whoever asks for a choice says so; it is replaced
        return {}
