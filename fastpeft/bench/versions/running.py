"""Run the tests of a leg, and keep what came of it."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from ..records import Environment, Record, RecordFile, environment
from .environments import ROOT, python_of, surroundings
from .legs import Leg

SUITE = "versions"
LIMIT_S = 3600.0
TESTS = tuple(
    f"tests/integration/test_{name}.py"
    for name in (
        *("trainers", "loss_trainers", "saving", "quantised_models", "attention_models", "attention_masks"),
        *("rotary", "loss", "models"),
    )
)
"""The seams: what others call of us, and what we read of theirs."""
_VERSIONS = "import json; from fastpeft.bench.records import installed_versions as v; print(json.dumps(v()))"


@dataclass(frozen=True)
class Outcome:
    """What came of a leg.

    Attributes:
        state: "ran"; "refused" where pip cannot install its versions together or there is no room for them; "broken"
            where the tests did not end.
        reason: of a state that is not "ran".
        passed, skipped: how many tests.
        failed: names of those that failed, and of files that could not be imported.
    """

    state: Literal["ran", "refused", "broken"]
    reason: str = ""
    passed: int = 0
    skipped: int = 0
    failed: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Nothing failed; an environment that cannot be made is no failure of ours."""
        return self.state == "refused" or (self.state == "ran" and not self.failed and self.passed > 0)


def run_leg(leg: Leg, folder: Path, out: Path, limit_s: float = LIMIT_S) -> Record:
    """Make the leg's environment, run the tests in it, append the record.

    Args:
        folder: of the environments.
        out: file of records.
        limit_s: the tests are killed then.
    """
    here = environment("cpu")
    try:
        python = python_of(leg, folder)
    except RuntimeError as error:
        return keep(RecordFile(out, replace(here, versions=leg.versions)), leg, Outcome("refused", str(error)))
    said = subprocess.run(
        [str(python), "-c", _VERSIONS], env=surroundings(), cwd=ROOT, capture_output=True, text=True, check=True
    )
    file = RecordFile(out, replace(here, versions=json.loads(said.stdout)))
    return keep(file, leg, run_tests(python, TESTS, limit_s))


def run_tests(python: Path, tests: Sequence[str], limit_s: float) -> Outcome:
    """The outcome of tests in a Python, by pytest's own report."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        command = [str(python), "-m", "pytest", "-q", "-m", "not full and not interpreter", "--tb=short"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        try:
            done = subprocess.run(command, env=surroundings(), cwd=ROOT, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return Outcome("broken", f"killed after {limit_s:.0f} s")
        if done.returncode not in (0, 1, 2) or not report.exists():
            return Outcome("broken", f"pytest ended with code {done.returncode}")
        return outcome_of(ElementTree.parse(report).getroot())


def outcome_of(report: ElementTree.Element) -> Outcome:
    """The outcome that a report in JUnit's format tells."""
    failed: list[str] = []
    passed = skipped = 0
    for case in report.iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            file = case.get("classname", "").rpartition("test_")[2]
            failed.append("::".join(filter(None, (f"test_{file}" if file else "", case.get("name", "")))))
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed += 1
    return Outcome("ran", "", passed, skipped, tuple(dict.fromkeys(failed)))


def keep(file: RecordFile, leg: Leg, outcome: Outcome) -> Record:
    """One record a leg; its sample is the number of tests that passed."""
    return file.add(
        suite=SUITE, case=leg.name, op="tests", peer="fastpeft", metric=outcome.state, unit="1",
        samples=float(outcome.passed),
        settings={
            "versions": leg.versions, "failed": list(outcome.failed), "skipped": outcome.skipped,
            "reason": outcome.reason,
        },
    )  # fmt: skip


def outcome(record: Record) -> Outcome:
    """What `keep` kept."""
    said = record.settings
    return Outcome(record.metric, said["reason"], int(record.median), said["skipped"], tuple(said["failed"]))  # type: ignore[arg-type]


def torch_of(where: Environment) -> str:
    """torch's minor version, "2.13"; one leg is another with another torch."""
    return ".".join(where.versions.get("torch", "").split(".")[:2])
