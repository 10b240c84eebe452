"""Parts of a GPU run in processes of their own, killed with all that they started when their time is up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .parts import GO_ON, Outcome, Part, Run, checks_note

MINIMUM_S = 60.0


class Budget:
    """Seconds that a run may take in all, split between its parts.

    A part that is `parallel`, which says whether the kernels are right, may take its whole limit. The others share what
    is left by their limits, with MINIMUM_S at the least; what one of them leaves goes to those after it.

    Args:
        total_s: of all parts together; infinite for no budget.
        clock: in seconds.
    """

    def __init__(self, total_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + total_s

    def seconds(self, part: Part, later: Sequence[Part]) -> float | None:
        """How long the part may take, with `later` still to come; None where too little is left to start it."""
        left, limit = self._end - self._clock(), part.time_limit_s
        if left < min(MINIMUM_S, limit):
            return None
        share = left if part.parallel else left * limit / sum(each.time_limit_s for each in (part, *later))
        return min(limit, left, max(share, MINIMUM_S))


def supervise(run: Run, part: Part, go_on: bool = False) -> Outcome:
    """Run `part` in processes of its own and kill them, with all that they started, when its time is up.

    Args:
        go_on: where an earlier run in the same circumstances left the part: its records stay, and checks that passed
            are not made again.

    Raises:
        KeyboardInterrupt: the processes are killed first.
    """
    done = sorted(name for name, passed in run.checks(part.name).items() if passed) if go_on else []
    known = {"proven": run.proven(part.name), "done": done}
    if not done:
        for old in (run.out / f"{part.name}.jsonl", run.log(part.name)):
            old.unlink(missing_ok=True)
    if part.broken:
        return run.outcome(part.name, "failed", 0.0, part.broken)
    if run.dry_run and part.dry_run is None:
        return run.outcome(part.name, "skipped", 0.0, "needs a GPU")
    note = checks_note(run.out, part.name)
    start = time.monotonic()
    try:
        note.write_text(json.dumps(known))
        codes = _codes(run, part, run.jobs if part.parallel else 1)
    finally:
        note.unlink(missing_ok=True)
    return _outcome(run, part, codes, time.monotonic() - start)


def _outcome(run: Run, part: Part, codes: list[int | None], seconds: float) -> Outcome:
    if None in codes:
        count = sum(run.checks(part.name).values())
        reason = f"killed at its limit of {part.time_limit_s:.0f} s, {count} checks passed; {GO_ON}"
        return run.outcome(part.name, "timed out", seconds, "; ".join([reason, *run.failures(part.name)]))
    if not any(codes):
        nothing = run.match and not (run.out / f"{part.name}.jsonl").exists()
        reason = f"no check in whose name {run.match!r} is found" if nothing else ""
        return run.outcome(part.name, "failed" if nothing else "passed", seconds, reason)
    crashed = [f"ended with code {code}" for code in codes if code not in (0, 1)]
    last = run.end_of_log(part.name).rpartition("\n")[2].strip()
    return run.outcome(part.name, "failed", seconds, "; ".join([*crashed, *run.failures(part.name)]) or last)


def _codes(run: Run, part: Part, count: int) -> list[int | None]:
    """Exit codes of `count` processes that share the part; None for one that was not done in time."""
    deadline = time.monotonic() + part.time_limit_s
    children: list[subprocess.Popen[Any]] = []
    codes: list[int | None] = []
    with open(run.log(part.name), "ab") as log:
        try:
            for i in range(count):
                command = _command(run, part, i, count)
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
                children.append(subprocess.Popen(command, **streams, start_new_session=True))  # type: ignore[call-overload]
            for child in children:
                with suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.0, deadline - time.monotonic()))
                codes.append(child.poll())
        finally:
            for child in children:
                _kill(child)
    return codes


def _command(run: Run, part: Part, i: int, count: int) -> list[str]:
    command = [sys.executable, "-u", "-m", "fastpeft.bench.gpu", "--run-part", part.name, "--parts", run.package]
    command += ["--out", str(run.out), "--depth", run.depth, "--share", str(i), str(count)]
    command += [*(["--dry-run"] if run.dry_run else []), f"--checks={run.match}"]
    return command + (["--commit", run.commit] if run.commit else [])


def _kill(child: subprocess.Popen[Any]) -> None:
    """The process, its group, and what it started in groups of their own, as fine-tuning does."""
    below = list(_descendants(child.pid)) if child.poll() is None else []
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    for pid in below:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    child.wait()


def _descendants(pid: int) -> Iterator[int]:
    """Where the system lists them."""
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for below in map(int, path.read_text().split()):
                yield below
                yield from _descendants(below)
