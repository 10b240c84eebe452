"""Legs of old and new versions: which there are, what pytest's report tells, what is kept of it, the page."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastpeft.bench.records import Record, RecordFile, environment, load
from fastpeft.bench.tables import insert
from fastpeft.bench.versions import __main__ as command
from fastpeft.bench.versions import environments, legs, running
from fastpeft.bench.versions.legs import FLOORS, Leg, names
from fastpeft.bench.versions.page import versions_table
from fastpeft.bench.versions.running import TESTS, Outcome, keep, outcome, outcome_of, run_tests
from tests.fresh import ROOT

RECORD, PAGE = ROOT / "benchmarks" / "results" / "cpu" / "versions.jsonl", ROOT / "docs" / "reference" / "coverage.md"
RELEASES = {
    "transformers": ["5.24.0", "5.17.0", "5.17.1", "5.16.3", "5.20.0", "5.20.2", "5.19.0", "4.57.6"],
    "peft": ["0.19.1", "0.19.2", "0.20.0", "0.21.0"],
    "accelerate": ["1.10.1", "1.10.0"],
    "bitsandbytes": ["0.48.2", "0.49.0", "0.50.2"],
    "trl": ["1.9.2", "1.10.0", "1.16.0"],
    "torch": ["2.15.0", "2.14.1", "2.13.0", "2.13.0+cpu", "2.11.0", "2.10.0"],
}
LEG = Leg("peft at its oldest", dict(zip(FLOORS, ("5.24.0", "0.19.1", "1.10.0", "0.50.2", "1.16.0"), strict=True)))


def made(tmp_path: Path, found: Outcome, leg: Leg = LEG, torch: str = "2.13.0") -> Record:
    where = replace(environment("cpu"), versions=leg.versions | {"torch": torch})
    return keep(RecordFile(tmp_path / "made.jsonl", where), leg, found)


def test_the_legs() -> None:
    found = {leg.name: leg.versions for leg in legs.legs(RELEASES)}
    newest = {"transformers": "5.24.0", "peft": "0.21.0", "accelerate": "1.10.0"}
    newest |= {"bitsandbytes": "0.50.2", "trl": "1.16.0"}
    assert found["all at their newest"] == newest
    assert found["all at their oldest"] == {
        "transformers": "5.17.0", "peft": "0.19.1", "accelerate": "1.10.0", "bitsandbytes": "0.49.0", "trl": "1.10.0",
    }  # fmt: skip
    assert found["transformers at its middle"] == newest | {"transformers": "5.20.2"}
    assert found["peft at its middle"] == newest | {"peft": "0.20.0"}
    assert found["trl at its oldest"] == newest | {"trl": "1.10.0"}
    assert found["torch at its oldest"] == newest | {"torch": "2.11.0"}
    assert found["torch at its newest"] == newest | {"torch": "2.15.0"}
    assert "trl at its middle" not in found and set(found) <= set(names())


def test_a_package_without_a_supported_release() -> None:
    with pytest.raises(ValueError, match=r"releases: expected some of peft>=0.19.1, got 0.18.0"):
        list(legs.legs(RELEASES | {"peft": ["0.18.0"]}))


def test_every_folder_is_its_own() -> None:
    assert len({Leg(name, {}).folder for name in names()}) == len(names())
    assert all((ROOT / path).exists() for path in TESTS)


SUITE = """
import pytest

def test_good(): pass
def test_bad(): assert not "a|b"
@pytest.fixture
def broken(): raise ValueError
def test_error(broken): pass
@pytest.mark.skip
def test_left(): pass
@pytest.mark.full
def test_slow(): assert False
"""


def test_what_pytest_says(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SUITE)
    found = run_tests(Path(sys.executable), [str(tmp_path / "test_some.py")], 60)
    assert (found.state, found.passed, found.skipped) == ("ran", 1, 1)
    assert found.failed == ("test_some::test_bad", "test_some::test_error") and not found.good


def test_a_file_that_cannot_be_imported_is_a_failure() -> None:
    report = '<testsuite><testcase classname="" name="tests.a.test_b"><error/></testcase></testsuite>'
    found = outcome_of(ElementTree.fromstring(report))
    assert found == Outcome("ran", failed=("tests.a.test_b",)) and not found.good


def test_a_python_that_has_no_pytest(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 4\n")
    python.chmod(0o755)
    assert run_tests(python, [], 60) == Outcome("broken", "pytest ended with code 4")


def test_tests_that_hang_are_killed(tmp_path: Path) -> None:
    (tmp_path / "test_hang.py").write_text("import time\ndef test_it(): time.sleep(60)\n")
    found = run_tests(Path(sys.executable), [str(tmp_path / "test_hang.py")], 0.5)
    assert (found.state, found.reason) == ("broken", "killed after 0 s") and not found.good


def test_versions_that_exclude_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(leg: Leg, folder: Path) -> Path:
        raise RuntimeError("ERROR: ResolutionImpossible")

    monkeypatch.setattr(running, "python_of", refused)
    record = running.run_leg(LEG, tmp_path, tmp_path / "out.jsonl")
    assert outcome(record) == Outcome("refused", "ERROR: ResolutionImpossible") and outcome(record).good
    assert record.environment.versions == LEG.versions


def test_an_environment_is_made_once_for_its_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(line: list[str]) -> str:
        asked.append(line)
        (tmp_path / LEG.folder).mkdir(exist_ok=True)
        return str(tmp_path)

    monkeypatch.setattr(environments, "_run", run)
    python = environments.python_of(LEG, tmp_path)
    assert "peft==0.19.1" in asked[-1] and len(asked) == 3
    assert environments.python_of(LEG, tmp_path) == python and len(asked) == 3
    environments.python_of(replace(LEG, versions=LEG.versions | {"peft": "0.20.0"}), tmp_path)
    assert "peft==0.20.0" in asked[-1] and len(asked) == 6


def test_an_environment_of_another_torch_is_made_by_pip_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    leg, folder = replace(LEG, versions=LEG.versions | {"torch": "2.15.0"}), tmp_path / "legs"

    def run(line: list[str]) -> str:
        asked.append(line)
        (folder / leg.folder).mkdir(exist_ok=True)
        return ""

    monkeypatch.setattr(environments, "_run", run)
    monkeypatch.setattr(environments, "WHOLE_GIB", 0)
    environments.python_of(leg, folder)
    (_, installing) = asked
    assert {"torch==2.15.0", "peft==0.19.1", f"{ROOT}[train,bench,dev]"} <= set(installing) and "-c" not in installing
    environments.python_of(leg, folder)
    assert len(asked) == 2
    monkeypatch.setattr(environments, "WHOLE_GIB", 10**9)
    said = running.run_leg(replace(leg, name="torch at its newest"), folder, tmp_path / "out.jsonl")
    assert outcome(said).state == "refused" and "needs 1000000000 GiB of room, got " in outcome(said).reason


def test_the_table(tmp_path: Path) -> None:
    bad = Outcome("ran", passed=3, skipped=1, failed=("test_a::test_b[x|y]",))
    text = versions_table([made(tmp_path, bad)])
    assert "| peft at its oldest | 2.13.0 |  | 5.24.0 | 0.19.1 | 1.10.0 | 0.50.2 | 1.16.0 | 3 | **1** [1] | 1 |" in text
    assert "- [1] test_a::test_b[x\\|y]" in text and "| all at their newest |" in text
    assert "| torch at its oldest |  |" in text and f"1 of {len(names())} legs" in text
    assert "| refused [1] |" in versions_table([made(tmp_path, Outcome("refused", "no"))])
    with pytest.raises(ValueError, match="records: expected some of legs, got none"):
        versions_table([])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- measured versions: begin -->\n<!-- measured versions: end -->\n")
    ran: list[str] = []

    def run(leg: Leg, folder: Path, out: Path, limit_s: float) -> Record:
        ran.append(leg.name)
        where = replace(environment("cpu"), versions=leg.versions | {"torch": "2.13.0"})
        failed = ("test_a",) if leg.name == "peft at its middle" else ()
        return keep(RecordFile(out, where), leg, Outcome("ran", passed=1, failed=failed))

    monkeypatch.setattr(command, "releases", RELEASES.__getitem__)
    monkeypatch.setattr(command, "run_leg", run)
    files = [f"--out={tmp_path / 'out'}", f"--record={tmp_path / 'record.jsonl'}", f"--page={page}"]
    assert command.main(["--only", "peft", *files]) == 1
    assert (
        ran == ["peft at its oldest", "peft at its middle"] and "peft at its middle: test_a" in capsys.readouterr().out
    )
    assert command.main(["--only", "at its middle", "--resume", *files]) == 1
    assert ran[2:] == ["transformers at its middle"] and len(load(tmp_path / "record.jsonl")) == 3
    assert command.main(["--only", "trl", *files]) == 0
    assert len(load(tmp_path / "record.jsonl")) == 4 and page.read_text().count("not run") == len(names()) - 4
    with pytest.raises(SystemExit):
        command.main(["--only", "no such", *files])


def test_the_page_is_made_of_the_record() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert insert(text, versions_table(load(RECORD)), command.NAME) == text
