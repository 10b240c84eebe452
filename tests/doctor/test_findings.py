"""Findings, guards, and what is kept private."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastpeft.doctor.findings import Finding, Status, attempt, guarded, in_short, note, ok, problem, worst
from fastpeft.doctor.private import scrub


@pytest.mark.parametrize(("status", "advice"), [(Status.ok, "Do it."), (Status.note, ""), (Status.problem, "")])
def test_advice_is_there_exactly_where_something_is_not_ok(status: Status, advice: str) -> None:
    with pytest.raises(ValueError, match="advice: expected"):
        Finding("a", status, "text", advice)


def test_the_worst_status() -> None:
    assert worst([]) is Status.ok
    assert worst([ok("a", "")]) is Status.ok
    assert worst([problem("a", "", "Do."), note("b", "", "Do."), ok("c", "")]) is Status.problem


def failing() -> Iterator[Finding]:
    yield ok("first", "fine")
    raise RuntimeError("no such thing\nand more")


def test_a_check_that_raises_is_a_finding_after_those_before() -> None:
    first, second = guarded("mine", failing, 5)
    assert first == ok("first", "fine")
    assert (second.name, second.status) == ("mine", Status.warning)
    assert second.values == {"error": "RuntimeError: no such thing"} and second.text.endswith("no such thing")


def test_names_stay_unique() -> None:
    assert [finding.name for finding in guarded("first", failing, 5)] == ["first", "first, rest"]


def test_a_check_that_ends_the_process_does_not() -> None:
    (finding,) = guarded("mine", lambda: sys.exit(3), 5)
    assert "SystemExit(3)" in finding.text


def test_a_check_that_hangs_is_a_finding() -> None:
    started = time.monotonic()
    (finding,) = guarded("mine", lambda: [ok("late", str(time.sleep(20)))], 0.2)
    assert time.monotonic() - started < 10
    assert finding.status is Status.warning and finding.text == "this check hangs: no answer in 0.2 s"


def test_attempt_gives_the_answer_or_the_error() -> None:
    assert attempt(lambda: 3, 5) == 3
    with pytest.raises(KeyError):
        attempt(lambda: {}["missing"], 5)


@pytest.mark.parametrize(
    ("said", "short"),
    [
        (ValueError("a\nb"), "ValueError: a"),
        (ValueError(), "ValueError"),
        ("\n\n  lib not found  \nmore", "lib not found"),
        ("", ""),
        ("x" * 300, "x" * 197 + "..."),
    ],
)
def test_errors_in_short(said: BaseException | str, short: str) -> None:
    assert in_short(said) == short


@pytest.fixture
def alice(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "alice")
    monkeypatch.setenv("HOME", "/data/people/alice")
    monkeypatch.setenv("USERPROFILE", "/data/people/alice")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("/data/people/alice/.cache/hub", "~/.cache/hub"),
        ("/data/people/alice-2/x", "/data/people/alice-2/x"),
        ("no file /scratch/alice/venv/bin/ptxas", "no file /scratch/<user>/venv/bin/ptxas"),
        ("/home/bob/lib.so: no such file", "/home/<user>/lib.so: no such file"),
        ("C:\\Users\\Bob\\torch", "C:\\Users\\<user>\\torch"),
        ("/mnt/c/Users/Bob/x", "/mnt/c/Users/<user>/x"),
        ("https://bob:pass@host/simple", "https://<secret>@host/simple"),
        ("token hf_abcdefghijk and s3cr3t-value!", "token <secret> and <secret>!"),
        ("libcuda.so.1 of alice's", "libcuda.so.1 of alice's"),
    ],
)
def test_names_and_secrets_are_blotted_out(alice: None, monkeypatch: pytest.MonkeyPatch, said: str, shown: str) -> None:
    monkeypatch.setenv("MY_API_KEY", "s3cr3t-value")
    assert scrub(said) == shown
    assert scrub({"alice": [said, 3, None]}) == {"alice": [shown, 3, None]}


def test_a_home_at_the_root_is_no_home(alice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setenv("USERPROFILE", "/")
    assert Path.home() == Path("/") and scrub("/opt/cuda/bin") == "/opt/cuda/bin"
