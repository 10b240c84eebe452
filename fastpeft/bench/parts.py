"""Finding the parts of a GPU run, running one in this process, and keeping what became of each."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Literal

from fastpeft.bench.recorder import CheckName, Recorder
from fastpeft.bench.records import RecordFile, environment, load
from fastpeft.structured import build

Status = Literal["passed", "failed", "timed out", "skipped", "interrupted"]
OUT_OF_TIME, GO_ON = "out of time", "--resume goes on"
_LOG_LINES = 25


@dataclass(frozen=True)
class Part:
    """A module of checks or benchmarks.

    Attributes:
        parallel: made of checks whose times do not count, so that several processes may share them.
        needs: packages without which there is nothing to run.
        broken: why it could not be imported.
    """

    name: str
    order: int = 0
    time_limit_s: float = 60
    parallel: bool = False
    needs: tuple[str, ...] = ()
    summary: str = ""
    run: Callable[[Recorder, str], None] | None = None
    dry_run: Callable[[Recorder, str], None] | None = None
    broken: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a part: `reason` is a line for people, `records` how many it wrote.

    One that is "interrupted" was under way when the run ended; one that is "skipped" as OUT_OF_TIME was never started.
    """

    name: str
    status: Status
    seconds: float
    records: int
    reason: str
    depth: str
    dry_run: bool
    commit: str | None
    match: str = ""

    @property
    def wrong(self) -> bool:
        """Whether something is wrong or missing."""
        return self.status not in ("passed", "skipped") or self.reason == OUT_OF_TIME


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
        parallel, needs = getattr(module, "parallel", False), getattr(module, "needs", ())
        return Part(name, module.order, module.time_limit_s, parallel, needs, summary, module.run, dry_run)
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
        share, match: of which checks; as for `Recorder`. What else that asks for is in `checks_note`.
    """
    function = part.dry_run if dry_run else part.run
    device = "cpu" if dry_run else "cuda"
    try:
        if function is None:
            raise RuntimeError(part.broken or f"the part has no {'dry_run' if dry_run else 'run'}")
        if missing := [name for name in part.needs if find_spec(name) is None]:
            print("\n".join(f"{name} is not installed: nothing was measured" for name in missing))
            return 0
        file = RecordFile(out / f"{part.name}.jsonl", environment(device, commit))
        note = checks_note(out, part.name)
        known = json.loads(note.read_text()) if note.exists() else {}
        known = {key: [(op, case) for op, case in names] for key, names in known.items()}
        function(Recorder(file, part.name, device, depth, share, match, **known), depth)
    except Exception as error:
        print(traceback.format_exc(), flush=True)  # in one write: other processes may share the log
        print(" ".join(f"{type(error).__name__}: {error}".split()), flush=True)
        return 1
    return 0


def checks_note(out: Path, name: str) -> Path:
    """Where the parent of a part's processes leaves for them what it knows of its checks, as `Recorder` takes it."""
    return out / f"{name}.checks.json"


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

    def earlier_outcome(self, name: str) -> Outcome | None:
        """Of the part in the same circumstances."""
        old = self._outcomes.get(name)
        now = (self.depth, self.dry_run, self.commit, self.match)
        return old if old and (old.depth, old.dry_run, old.commit, old.match) == now else None

    def keep(self, outcome: Outcome) -> Outcome:
        """Write the outcome down, so that the file is whole at any time, and return it."""
        self._outcomes[outcome.name] = outcome
        new = self._path.with_suffix(".json.new")
        new.write_text(json.dumps([asdict(one) for one in self._outcomes.values()], indent=1) + "\n")
        os.replace(new, self._path)
        return outcome

    def outcome(self, name: str, status: Status, seconds: float, reason: str) -> Outcome:
        records = self.out / f"{name}.jsonl"
        count = len(records.read_text().splitlines()) if records.exists() else 0
        circumstances = (self.depth, self.dry_run, self.commit, self.match)
        return Outcome(name, status, round(seconds, 1), count, reason, *circumstances)

    def checks(self, name: str) -> dict[CheckName, bool]:
        """Which checks of a part left a record that they passed, or failed; the last of each counts."""
        path = self.out / f"{name}.jsonl"
        if not path.exists():
            return {}
        data = path.read_bytes()
        if not data.endswith(b"\n"):  # a record was cut off by what ended the part
            path.write_bytes(data[: data.rfind(b"\n") + 1])
        return {(r.op, r.case): bool(r.median) for r in load(path) if r.metric == "passed"}

    def failures(self, name: str) -> list[str]:
        """Which checks of a part failed, and how many, as a line; none where none did."""
        failed = [case for (_, case), passed in self.checks(name).items() if not passed]
        return [f"{len(failed)} failed: {', '.join(failed)}"] if failed else []

    def proven(self, name: str) -> list[CheckName]:
        """Checks of a part that passed in earlier runs, of any version, and failed in none."""
        became: dict[bool, set[CheckName]] = {True: set(), False: set()}
        for path in self.earlier.glob(f"{name}*.jsonl") if self.earlier else ():
            with suppress(ValueError):  # of another schema, or cut off: what comes first is no reason to run nothing
                for record in load(path):
                    if record.metric == "passed":
                        became[bool(record.median)].add((record.op, record.case))
        return sorted(became[True] - became[False])

    def log(self, name: str) -> Path:
        return self.out / f"{name}.log"

    def end_of_log(self, name: str) -> str:
        """The last lines that a part printed, indented."""
        path = self.log(name)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join(f"    {line}" for line in lines[-_LOG_LINES:])
