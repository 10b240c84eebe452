"""`python -m benchmarks.fuzz [--seconds 225] [--only configuration]`: every reader of what comes from outside, fuzzed.

Each target has a process of its own for Hypothesis and, where it is installed, one for atheris. What they found goes
into the record, in place of what the same targets found before, and from there into the table of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from base64 import b64encode
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastpeft.bench.records import environment
from fastpeft.bench.tables import insert

from .targets import GROUPS
from .watching import LONGEST_S
from .worker import MEMORY

ROOT = Path(__file__).parents[2]
RECORD, PAGE = ROOT / "benchmarks/results/cpu/fuzz.json", ROOT / "docs/reliability.md"
ENGINES = {"hypothesis": 1 / 3, "atheris": 2 / 3}
"""Each with its share of the time."""
START_S = 180
"""For imports, and for what a reader that hangs outside of Python has until its process is killed."""


def fuzz(name: str, seconds: float) -> dict[str, Any]:
    """What each engine did with a target in that time, and what both found."""
    with tempfile.TemporaryDirectory() as place:
        engines = {}
        for engine, share in ENGINES.items():
            if find_spec(engine) is not None:
                engines[engine] = _run(name, engine, seconds * share, Path(place))
        log = Path(place) / "findings.jsonl"
        findings = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    versions = {engine: metadata.version(engine) for engine in engines}
    where = environment("cpu")
    return {"engines": engines, "findings": findings, "versions": versions | where.versions, "date": where.date}


def _run(name: str, engine: str, seconds: float, place: Path) -> dict[str, Any]:
    caches = place / "input" / "caches"
    caches.mkdir(parents=True, exist_ok=True)
    names = ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR")
    own = {name: str(caches / name.lower()) for name in names} | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(caches)}
    command = [sys.executable, "-m", "benchmarks.fuzz.worker", name, engine, f"{seconds:.0f}", str(place)]
    with (place / "log").open("wb") as log:
        worker = subprocess.Popen(
            command, env=os.environ | own, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = worker.wait(seconds + START_S)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            code = worker.wait()
    said = (place / "log").read_text(errors="replace")
    if code:
        _add_death(place, code, said)
    done: dict[str, Any] = {"seconds": round(seconds)}
    for figure, pattern in (("executions", r"stat::number_of_executed_units: (\d+)"), ("read", r"stat::read: (\d+)"),
                            ("edges", r"cov: (\d+)")):  # fmt: skip
        if found := re.findall(pattern, said):
            done[figure] = int(found[-1])
    return done


def _add_death(place: Path, code: int, said: str) -> None:
    """A process that did not come to its end: the input is there still."""
    inputs = [path for path in (place / "input").iterdir() if path.is_file()]
    what = f"the process ended with {code}: {' '.join(said.split())[-300:]}"
    line = {"what": what, "where": "", "input": b64encode(inputs[0].read_bytes()[:4096]).decode() if inputs else ""}
    with (place / "findings.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def table(record: dict[str, Any]) -> str:
    """Inputs, code reached and findings of each target."""
    lines = ["| what is read | inputs | of these drawn from valid ones, and read | branches reached | findings |"]
    lines.append("|---|---|---|---|---|")
    executions = seconds = findings = 0
    for names in GROUPS.values():
        for name in names:
            if (found := record["targets"].get(name)) is None:
                continue
            each = found["engines"].values()
            drawn = found["engines"].get("hypothesis", {})
            inputs = sum(engine.get("executions", 0) for engine in each)
            edges = found["engines"].get("atheris", {}).get("edges", "")
            shown = f"{drawn.get('executions', 0):,}, {drawn.get('read', 0):,}"
            lines.append(f"| {name} | {inputs:,} | {shown} | {edges} | {len(found['findings'])} |")
            executions, findings = executions + inputs, findings + len(found["findings"])
            seconds += sum(engine["seconds"] for engine in each)
    versions = next(iter(record["targets"].values()))["versions"]
    used = ", ".join(f"{name} {versions[name]}" for name in (*ENGINES, "torch", "datasets") if name in versions)
    return "\n".join(
        [
            *lines,
            "",
            f"{executions:,} inputs in {seconds / 60:.0f} minutes, {findings} findings. An input may take "
            f"{LONGEST_S:g} s (twice that where atheris counts branches) and {MEMORY >> 30} GiB, and writes nothing "
            "outside of the folder that it lies in. "
            f"{record['device']}, {used}; `python -m benchmarks.fuzz`.",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    names = [name for some in GROUPS.values() for name in some]
    parser.add_argument("--seconds", type=float, default=3600 / len(names), help="for each target")
    parser.add_argument("--only", action="append", choices=names, help="a target; repeatable")
    parser.add_argument("--table", action="store_true", help="run nothing; make the table anew from the record")
    options = parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"targets": {}}
    for name in () if options.table else options.only or names:
        record["targets"][name] = fuzz(name, options.seconds)
        record["device"] = environment("cpu").device
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {record['targets'][name]}", flush=True)
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), table(record), "fuzz"), encoding="utf-8")
    return sum(len(found["findings"]) for found in record["targets"].values())


if __name__ == "__main__":
    sys.exit(main())
