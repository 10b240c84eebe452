"""A decoder layer's projections, forward and backward, beside their frozen products alone and beside other libraries.

Time is the device's own, in interleaved rounds; where asked for, the wall's too, with the host's time in it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .layer_peers import PRODUCTS, REFERENCE, Peer, builders
from .layer_work import Case, Work, prepare
from .left_out import NotHereError, reason_of
from .memory import peak_of_step
from .timer import Step, interleaved, ratio

TOLERANCE = 2e-2  # relative, of the Frobenius norm: bf16 against bf16, so that nothing broken is timed


@dataclass
class Result:
    """What was measured of a case, by peer.

    Attributes:
        ms: device time of forward and backward in each round; index i belongs to round i everywhere.
        wall_ms: the same with the host's time; empty where it was not asked for.
        peak_mib: most memory that one forward and backward takes; kept_mib: what forward keeps for backward beside its
            outputs. Both without buffers that outlive the step, and empty on a CPU.
        error: largest relative deviation of an output or a gradient from PEFT's.
        left_out: why a peer was not measured; `broken` are those that could have been.
    """

    case: Case
    ms: dict[str, list[float]] = field(default_factory=dict)
    wall_ms: dict[str, list[float]] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    kept_mib: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def ratio(self, peer: str, to: str) -> float | None:
        """Median over rounds of one's time divided by another's; None where either was left out."""
        return ratio(self.ms, peer, to) if peer in self.ms and to in self.ms else None


def measure(case: Case, device: str, rounds: int, wall_rounds: int, clock: Callable[[Step], float]) -> Result:
    """Check every peer's numbers, then time those that hold.

    Args:
        case: what to compute.
        device: "cuda" or "cpu".
        rounds: samples of device time a peer.
        wall_rounds: samples of wall time a peer; 0 for none.
        clock: from `timer.device_clock`.
    """
    result, work = Result(case), prepare(case, device)
    steps = _checked(work, result)
    for name, step in steps.items():
        if device == "cuda":
            result.peak_mib[name], result.kept_mib[name] = _memory_mib(step)
    result.ms = interleaved(steps, rounds, warmup=1, clock=clock)
    if wall_rounds:
        result.wall_ms = interleaved(steps, wall_rounds, warmup=0, device=device)
    return result


def _checked(work: Work, result: Result) -> dict[str, Any]:
    """The peers whose numbers are PEFT's, each called once or more; the others are noted in `result`."""
    steps: dict[str, Any] = {}
    makers = builders(work)
    wanted = makers[REFERENCE]()()
    for name, make in makers.items():
        try:
            step = make()
            found = step()
            if step.checked:
                result.error[name] = _deviation(found, wanted)
            steps[name] = step
        except NotHereError as error:
            result.left_out[name] = reason_of(error)
        except Exception as error:
            traceback.print_exc()
            result.left_out[name] = reason_of(error)
            result.broken.append(name)
    return steps


def _deviation(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest relative deviation, by the Frobenius norm, of any of the results."""
    worst = 0.0
    for i, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        if ours.shape != theirs.shape:
            raise AssertionError(f"result {i}: expected shape {tuple(theirs.shape)}, got {tuple(ours.shape)}")
        deviation = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
        if not deviation <= TOLERANCE:
            raise AssertionError(f"result {i}: deviates from PEFT's by {deviation:.1e}, over {TOLERANCE:.0e}")
        worst = max(worst, deviation)
    return worst


def _memory_mib(step: Any) -> tuple[float, float]:
    before = torch.cuda.memory_allocated()
    peak = peak_of_step(step)
    if not isinstance(step, Peer):
        return peak / 2**20, 0.0
    outputs = step.forward()
    kept = torch.cuda.memory_allocated() - before - sum(y.nbytes for y in outputs)
    return peak / 2**20, kept / 2**20


def table(results: Sequence[Result]) -> str:
    """One line a case and peer."""
    lines = [
        f"{'':46}{'ms':>9}{'/ products':>12}{'/ peft':>8}{'wall ms':>9}{'peak MiB':>10}{'kept MiB':>10}{'error':>9}"
    ]
    for result in results:
        lines.append(result.case.name)
        for peer, samples in result.ms.items():
            figures = [f"{median(samples):9.3f}"]
            figures += [_cell(result.ratio(peer, PRODUCTS), 12, 3), _cell(result.ratio(peer, REFERENCE), 8, 3)]
            figures += [_cell(median(result.wall_ms[peer]) if peer in result.wall_ms else None, 9, 2)]
            figures += [_cell(result.peak_mib.get(peer), 10, 0), _cell(result.kept_mib.get(peer), 10, 0)]
            error = result.error.get(peer)
            lines.append(f"    {peer:42}{''.join(figures)}{'' if error is None else f'{error:9.1e}'}")
        lines += [f"    {peer:42} left out: {reason}" for peer, reason in result.left_out.items()]
    return "\n".join(lines)


def _cell(value: float | None, width: int, digits: int) -> str:
    return " " * width if value is None else f"{value:{width}.{digits}f}"
