"""A few inputs for every reader of what comes from outside; `python -m benchmarks.fuzz` gives them an hour."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz.targets import GROUPS, target_of
from benchmarks.fuzz.watching import Examiner, Target

NAMES = [name for names in GROUPS.values() for name in names]
QUICK = ("configuration", "settings", "records", "tuning", "states of checkpoints", "seals of checkpoints")


@pytest.fixture(autouse=True)
def caches_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))


def examples(name: str, folder: Path, count: int) -> None:
    target = target_of(name)
    caches = Path(tempfile.gettempdir())  # of `datasets`, for all tests
    examine = Examiner(target, folder, 60, caches)  # machines under load

    @settings(max_examples=count, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(target.texts)
    def every_one(data: bytes) -> None:
        assert examine(data) is None

    every_one()
    assert examine.accepted, "nothing was read"


@pytest.mark.parametrize("name", QUICK)
def test_any_bytes_are_read_or_refused(name: str, tmp_path: Path) -> None:
    examples(name, tmp_path, 25)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_many_bytes_are_read_or_refused(name: str, tmp_path: Path) -> None:
    examples(name, tmp_path, 200)


def raises(error: BaseException) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        raise error

    return read


def hangs(path: Path) -> None:
    while True:
        pass


def writes(path: Path) -> None:
    path.parent.with_name("elsewhere").write_text("")


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (lambda path: None, None),
        (lambda path: path.with_name("beside").write_text(""), None),
        (raises(ValueError("a.txt: not this")), None),
        (raises(ValueError("not this")), "ValueError that names no place: not this"),
        (raises(KeyError("x")), "KeyError: 'x'"),
        (raises(MemoryError()), "MemoryError: "),
        (hangs, "_TooLongError: more than"),
        (writes, "written outside: open .*elsewhere"),
    ],
)
def test_what_breaks_the_promise_is_found(read: Callable[[Path], Any], found: str | None, tmp_path: Path) -> None:
    (tmp_path / "input").mkdir()
    examine = Examiner(Target("a", "a.txt", st.just(b""), read, (ValueError,)), tmp_path / "input", 0.2)
    finding = examine(b"anything")
    assert (finding is None) if found is None else re.match(found, finding.what if finding else "")
