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
    from fastpeft.bench.ops.finding import ops

    recorder.run_suites(
        {op: [(f"bench {op}", partial(_op, recorder, depth, cases))] for op, (_, cases) in ops().items()}
    )


def dry_run(recorder: Recorder, depth: str) -> None:
    run(recorder, "quick")


def _op(recorder: Recorder, depth: str, cases: Cases) -> dict[str, float]:
    from fastpeft.bench.ops.run import Runner
    from fastpeft.bench.ops.table import table

    outcome = Runner(recorder.add, recorder.device, depth).run(cases(recorder.device, depth))
    print(table(outcome.records))
    assert not outcome.failures, "; ".join(outcome.failures)
    return {"records": len(outcome.records)}
