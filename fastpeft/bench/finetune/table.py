"""What was measured of a case, for people."""

from __future__ import annotations

from statistics import median

from fastpeft.bench.timer import ratio

from .peers import EXACT, PEFT
from .result import Result


def table(result: Result) -> str:
    """One line a peer."""
    head = f"{'':26}{'ms/step':>9}{'/ peft':>8}{'tokens/s':>10}{'MFU':>7}{'step / peft':>13}{'peak MiB':>10}"
    lines = [result.case.name, f"{head}{'1st step s':>12}{'last loss':>11}{'differs':>9}{'allowed':>9}"]
    lines += [_line(result, peer) for peer in result.runs if peer != EXACT]
    lines += [f"{peer:26} left out: {reason}" for peer, reason in result.left_out.items()]
    return "\n".join(lines)


def _line(result: Result, peer: str) -> str:
    runs, found = result.runs[peer], result.agreement(peer)
    timed = peer not in result.left_out
    ms = median(result.step_ms(peer)) if timed else None
    peft = median(result.step_ms(PEFT)) if PEFT in result.runs else None
    beside = (
        ratio({"peer": result.steps[peer][0], PEFT: result.steps[peer][1]}, "peer", PEFT)
        if peer in result.steps
        else None
    )
    cells = [
        _cell(ms, 9, ".1f"),
        _cell(ms / peft if ms and peft else None, 8, ".3f"),
        _cell(median(result.speed(peer)) if timed else None, 10, ".0f"),
        _cell(result.utilisation(peer) if timed else None, 7, ".3f"),
        _cell(beside, 13, ".3f"),
        _cell(median(run.peak_mib for run in runs), 10, ".0f"),
        _cell(median(run.seconds["to first step"] for run in runs) if result.alone else None, 12, ".1f"),
        _cell(runs[0].losses[-1], 11, ".4f"),
        _cell(found.found if found else None, 9, ".1e"),
        _cell(found.allowed if found else None, 9, ".1e"),
    ]
    return f"{peer:26}{''.join(cells)}"


def _cell(value: float | None, width: int, kind: str) -> str:
    return f"{'-' if value is None else format(value, kind):>{width}}"
