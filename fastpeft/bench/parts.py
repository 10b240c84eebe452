"""Finding the parts of a GPU run, running one, and keeping what became of each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal

from fastpeft.bench.recorder import Recorder
from fastpeft.bench.records import RecordFile, environment, load
from fastpeft.structured import build

Status = Literal["passed", "failed", "timed out", "skipped"]
_LOG_LINES = 25


@dataclass(frozen=True)
class Part:
    """A module of checks or benchmarks.

    Attributes:
        parallel: made of checks whose times do not count, so that several processes may share them.
        broken: why it could not be imported.
    """

    name: str
    order: int = 0
    time_limit_s: float = 60
    parallel: bool = False
    summary: str = ""
    run: Callable[[Recorder, str], None] | None = None
    dry_run: Callable[[Recorder, str], None] | None = None
    broken: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a part: `reason` is a line for people, `records` how many it wrote."""

    name: str
    status: Status
    seconds: float
    records: int
    reason: str
    depth: str
    dry_run: bool
    commit: str | None
    match: str = ""


def discover(package: str) -> dict[str, Part]:
    """The parts of `package` by name, in the order in which they run. One that cannot be imported is there too."""
    path = import_module(package).__path__
    parts = [_import_part(package, info.name) for info in iter_modules(path)]
    return {part.name: part for part in sorted(parts, key=lambda part: (part.order, part.name))}


def _import_part(package: str, name: str) -> Part:
    try:
        module = import_module(f"{package}.{name}")
        summary = (module.__doc__ or "").strip().partition("\n")[0]
        name, dry_run = getattr(module, "name", name), getattr(module, "dry_run", None)
        parallel = getattr(module, "parallel", False)
        return Part(name, module.order, module.time_limit_s, parallel, summary, module.run, dry_run)
    except Exception as error:  # a broken part must not keep the others from running
        return Part(name, broken=f"{type(error).__name__}: {error}")


def run_part(
    part: Part,
    out: Path,
    depth: str,
    dry_run: bool,
    commit: str | None,
    share: tuple[int, int] = (0, 1),
    match: str = "",
) -> int:
    """Run `part` in this process. Returns the exit code: 0, or 1 with the reason as the last line printed.

    Args:
        share, match: of which checks; as for `Recorder`. Those that passed before, by `Run.proven`, come last.
    """
    function = part.dry_run if dry_run else part.run
    device = "cpu" if dry_run else "cuda"
    try:
        if function is None:
            raise RuntimeError(part.broken or f"the part has no {'dry_run' if dry_run else 'run'}")
        file = RecordFile(out / f"{part.name}.jsonl", environment(device, commit))
        names = _proven(out, part.name)
        proven = frozenset(json.loads(names.read_text()) if names.exists() else ())
        function(Recorder(file, part.name, device, depth, share, match, proven), depth)
    except Exception as error:
        print(traceback.format_exc(), flush=True)  # in one write: other processes may share the log
        print(" ".join(f"{type(error).__name__}: {error}".split()), flush=True)
        return 1
    return 0


def _proven(out: Path, name: str) -> Path:
    """Where the parent of a part's processes leaves the names of checks that passed before."""
    return out / f"{name}.proven.json"


class Run:
    """A run's folder and state.

    Args:
        out: the folder, made if it is not there. Outcomes of parts that this run leaves out stay in its run.json.
        depth, dry_run, commit: what a finished part must share to be skipped by a run that resumes.
        package: where child processes find the parts.
        jobs: processes that share a part that is `parallel`.
        match: a regular expression for the names of the checks to run.
        earlier: folder of an earlier run's records on this GPU.
    """

    def __init__(
        self,
        out: Path,
        depth: str,
        dry_run: bool,
        commit: str | None,
        package: str,
        jobs: int = 1,
        match: str = "",
        earlier: Path | None = None,
    ) -> None:
        self.out, self.depth, self.dry_run, self.commit, self.package = out, depth, dry_run, commit, package
        self.jobs, self.match, self.earlier = jobs, match, earlier
        out.mkdir(parents=True, exist_ok=True)
        self._path = out / "run.json"
        rows = json.loads(self._path.read_text()) if self._path.exists() else []
        self._outcomes = {outcome.name: outcome for outcome in (build(Outcome, row) for row in rows)}

    def finished(self, name: str) -> Outcome | None:
        """The outcome of a part that passed already, in the same circumstances."""
        old = self._outcomes.get(name)
        now = (self.depth, self.dry_run, self.commit, self.match)
        same = old is not None and (old.depth, old.dry_run, old.commit, old.match) == now
        return old if same and old is not None and old.status == "passed" else None

    def keep(self, outcome: Outcome) -> None:
        """Write the outcome down, so that the file is whole at any time."""
        self._outcomes[outcome.name] = outcome
        new = self._path.with_suffix(".json.new")
        new.write_text(json.dumps([asdict(one) for one in self._outcomes.values()], indent=1) + "\n")
        os.replace(new, self._path)

    def outcome(self, name: str, status: Status, seconds: float, reason: str) -> Outcome:
        records = self.out / f"{name}.jsonl"
        count = len(records.read_text().splitlines()) if records.exists() else 0
        circumstances = (self.depth, self.dry_run, self.commit, self.match)
        return Outcome(name, status, round(seconds, 1), count, reason, *circumstances)

    def failures(self, name: str) -> list[str]:
        """Which checks of a part left a record that they failed, and how many, as a line; none where none did."""
        path = self.out / f"{name}.jsonl"
        records = load(path) if path.exists() else []
        failed = [record.case for record in records if record.metric == "passed" and not record.median]
        return [f"{len(failed)} failed: {', '.join(failed)}"] if failed else []

    def proven(self, name: str) -> list[str]:
        """Checks of a part that passed in earlier runs, of any version, and failed in none."""
        became: dict[bool, set[str]] = {True: set(), False: set()}
        for path in self.earlier.glob(f"{name}*.jsonl") if self.earlier else ():
            with suppress(ValueError):  # of another schema, or cut off: what comes first is no reason to run nothing
                for record in load(path):
                    if record.metric == "passed":
                        became[bool(record.median)].add(record.case)
        return sorted(became[True] - became[False])

    def log(self, name: str) -> Path:
        return self.out / f"{name}.log"

    def end_of_log(self, name: str) -> str:
        """The last lines that a part printed, indented."""
        path = self.log(name)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(f"    {line}" for line in lines[-_LOG_LINES:])


def supervise(run: Run, part: Part) -> Outcome:
    """Run `part` in processes of its own and kill them, with all that they started, when its time is up."""
    names, proven = _proven(run.out, part.name), run.proven(part.name) if part.parallel else []
    for old in (run.out / f"{part.name}.jsonl", run.log(part.name)):
        old.unlink(missing_ok=True)
    if part.broken:
        return run.outcome(part.name, "failed", 0.0, part.broken)
    if run.dry_run and part.dry_run is None:
        return run.outcome(part.name, "skipped", 0.0, "needs a GPU")
    start = time.monotonic()
    try:
        names.write_text(json.dumps(proven))
        codes = _codes(run, part, run.jobs if part.parallel else 1)
    finally:
        names.unlink(missing_ok=True)
    seconds = time.monotonic() - start
    if None in codes:
        return run.outcome(part.name, "timed out", seconds, f"killed at its limit of {part.time_limit_s} s")
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
                _kill_group(child)
    return codes


def _command(run: Run, part: Part, i: int, count: int) -> list[str]:
    command = [sys.executable, "-u", "-m", "fastpeft.bench.gpu", "--run-part", part.name, "--parts", run.package]
    command += ["--out", str(run.out), "--depth", run.depth, "--share", str(i), str(count)]
    command += [*(["--dry-run"] if run.dry_run else []), f"--checks={run.match}"]
    return command + (["--commit", run.commit] if run.commit else [])


def _kill_group(child: subprocess.Popen[Any]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
