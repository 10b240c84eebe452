"""Every op beside its peers, as `fastpeft bench` measures them: numbers first, then times, memory and ceilings."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fastpeft.bench.recorder import Recorder

if TYPE_CHECKING:
    from fastpeft.bench.ops.finding import Cases

order = 30
time_limit_s = 480


def run(recorder: Recorder, depth: str) -> None:
    _run(recorder, depth, None)


def dry_run(recorder: Recorder, depth: str) -> None:
    _run(recorder, "quick", 1)


def _run(recorder: Recorder, depth: str, rounds: int | None) -> None:
    from fastpeft.bench.ops.finding import ops

    recorder.run_suites(
        {op: [(f"bench {op}", partial(_op, recorder, depth, rounds, cases))] for op, (_, cases) in ops().items()}
    )


def _op(recorder: Recorder, depth: str, rounds: int | None, cases: Cases) -> dict[str, float]:
    from fastpeft.bench.ops.run import Runner
    from fastpeft.bench.ops.table import table

    outcome = Runner(recorder.add, recorder.device, depth, rounds).run(cases(recorder.device, depth))
    print(table(outcome.records))
    assert not outcome.failures, "; ".join(outcome.failures)
    return {"records": len(outcome.records)}
