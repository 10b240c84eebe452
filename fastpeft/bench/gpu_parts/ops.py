"""Every op beside its peers, as `fastpeft bench` measures them: numbers first, then times, memory and ceilings."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from fastpeft.bench.recorder import Check, Recorder

if TYPE_CHECKING:
    from fastpeft.bench.ops.case import OpCase
    from fastpeft.bench.ops.run import Runner

order = 30
time_limit_s = 480


def run(recorder: Recorder, depth: str) -> None:
    _run(recorder, depth, None)


def dry_run(recorder: Recorder, depth: str) -> None:
    _run(recorder, "quick", 1)


def _run(recorder: Recorder, depth: str, rounds: int | None) -> None:
    from fastpeft.bench.ops.finding import ops
    from fastpeft.bench.ops.run import Runner

    runner = Runner(recorder.add, recorder.device, depth, rounds)
    recorder.run_suites({op: _checks(runner, op, cases(recorder.device, depth)) for op, (_, cases) in ops().items()})


def _checks(runner: Runner, op: str, cases: Iterator[OpCase]) -> Iterator[Check]:
    for case in cases:
        yield f"bench {op}: {case.name}, {str(case.dtype)[6:]}", partial(_case, runner, case)


def _case(runner: Runner, case: OpCase) -> dict[str, float]:
    from fastpeft.bench.ops.table import table

    before, failed = len(runner.outcome.records), len(runner.outcome.failures)
    outcome = runner.run([case])
    print(table([r for i, r in enumerate(outcome.records) if i >= before or r.op == "ceiling"]))
    assert not outcome.failures[failed:], "; ".join(outcome.failures[failed:])
    return {"records": len(outcome.records) - before}
