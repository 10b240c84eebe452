"""Records of a case, each added when it is whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .peers import EXACT, PEFT
from .result import Result

Add = Callable[..., Any]
"""Takes the fields of a record."""


def keep_ceilings(result: Result, add: Add) -> None:
    """What the machine can do at the most."""
    for name, samples in result.ceilings.items():
        unit = "GB/s" if name == "copy" else "TFLOP/s"
        settings = {"threads": result.case.threads}
        add(case=name, op="ceiling", peer="torch", metric="rate", unit=unit, samples=samples, settings=settings)


def keep(result: Result, peer: str, add: Add) -> None:
    """One record a metric of a peer's runs; no time for one that is left out."""
    common = {"case": result.case.name, "op": "run", "peer": peer}
    settings = {**result.case.settings, "direction": "both"}
    if peer in result.left_out:
        why = {**settings, "reason": result.left_out[peer]}
        add(**common, metric="left out", unit="1", samples=1, settings=why)
    if not (runs := result.runs.get(peer)):
        return
    found = result.agreement(peer)
    held = {} if found is None else {"error": found.found, "budget": found.allowed}

    def each(metric: str, unit: str, samples: Sequence[float]) -> None:
        add(**common, metric=metric, unit=unit, samples=samples, settings=settings)

    each("final loss", "1", [run.losses[-1] for run in runs])
    each("loss", "1", runs[0].losses)
    if peer == EXACT:
        return
    if found is not None:
        each("loss difference", "1", [found.from_peft])
    each("peak memory", "MiB", [run.peak_mib for run in runs])
    if result.case.device == "cuda":
        each("model memory", "MiB", [run.model_mib for run in runs])
    for name in runs[0].seconds if result.alone else ():
        each(f"time {name}" if name.startswith("to ") else f"{name} time", "s", [run.seconds[name] for run in runs])
    each("trained parameters", "1", [float(run.trained) for run in runs])
    if peer in result.left_out:
        return
    flops = next((run.flops for run in result.runs.get(PEFT, ()) if run.flops), None)
    work = {**settings, "flops": flops} if flops else settings
    add(**common, metric="time", unit="ms", samples=result.step_ms(peer), settings=work, **held)
    add(**common, metric="speed", unit="tokens/s", samples=result.speed(peer), settings=work, **held)
    if (used := result.utilisation(peer)) is not None:
        each("model FLOPs utilisation", "1", [used])


def keep_steps(result: Result, peer: str, add: Add) -> None:
    """Single steps of a peer, and of plain PEFT in the same rounds."""
    settings = {**result.case.settings, "direction": "both", "beside": peer}
    for name, samples in zip((peer, PEFT), result.steps[peer], strict=True):
        add(
            case=result.case.name, op="step", peer=name, metric="time", unit="ms", samples=samples, settings=settings
        )  # fmt: skip
