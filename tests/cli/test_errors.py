"""What commands say when they end early: by whom, and what advice."""

from __future__ import annotations

import os
import re
import tempfile
from importlib import import_module
from pathlib import Path

import pytest
import typer

from fastpeft.cli import app
from fastpeft.config_keys import key_of
from fastpeft.errors import Interrupted
from tests.checkpoints import SHIPPED


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """`fastpeft generate` ends with the error in this list."""
    errors: list[BaseException] = []

    def find(*_: object, **__: object) -> None:
        raise errors[0]

    monkeypatch.setattr("fastpeft.models.tuned.find", find)
    return errors


@pytest.mark.parametrize("command", app.LESS_MEMORY)
def test_less_memory_is_asked_for_by_options_that_there_are(command: str) -> None:
    named = re.findall(r"--[\w.-]+\w", app.LESS_MEMORY[command])
    parameters = typer.main.get_command(app.app).commands[command].params  # type: ignore[attr-defined]
    there = {option for parameter in parameters for option in parameter.opts}
    assert named and all(key_of(option[2:]) if command in ("train", "compare") else option in there for option in named)


def test_out_of_memory_is_said_with_the_command_s_own_options(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing.append(OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    monkeypatch.setenv("LOCAL_RANK", "1")  # it may be this process's GPU alone
    assert app.run(["generate", "x", "-p", "y"]) == 1
    wanted = f"out of GPU memory: CUDA out of memory. Less is needed with {app.LESS_MEMORY['generate']}"
    assert capsys.readouterr().err == f"fastpeft: {wanted}\n"


CLOSED = [
    ["train", "--model", SHIPPED, "--data", "closed/x.jsonl"],
    ["train", "--model", SHIPPED, "--data", "unreadable.jsonl"],
    ["train", "--model", "closed/m", "--data", "texts.jsonl"],
    ["train", "--model", SHIPPED, "--data", "texts.jsonl", "--output-dir", "closed/a/b"],
    ["train", "closed/run.yaml"],
    ["train", "--model", SHIPPED, "--data", "n" * 256 + ".jsonl"],
    ["generate", "closed/m", "-p", "x"],
    ["generate", SHIPPED, "--file", "closed/x.txt"],
    ["generate", SHIPPED, "-p", "x", "--output", "closed/x.jsonl"],
    ["generate", SHIPPED, "-p", "x", "--output", "n" * 256],
    ["merge", "closed/m", "merged"],
    ["merge", SHIPPED, "closed/out"],
    ["verify", "closed/m"],
    ["memorization", "closed/r"],
    ["groups", "closed/r", "--data", "closed/x.csv", "--by", "x"],
]


@pytest.fixture(scope="module")
def imported() -> None:
    """What commands import when they run: somebody else may not read where Python is installed."""
    for name in ("datasets", "pandas", "fastpeft.strategies.run", "fastpeft.strategies.task"):
        import_module(name)


@pytest.mark.usefixtures("imported")
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("words", CLOSED, ids=lambda words: " ".join(word for word in words if word != SHIPPED)[:40])
def test_paths_that_cannot_be_looked_at(
    words: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        monkeypatch.chdir(folder)
        Path("closed").mkdir(mode=0o700)
        Path("texts.jsonl").write_text('{"text": "a b"}\n')
        Path("unreadable.jsonl").write_text('{"text": "a b"}\n')
        Path("unreadable.jsonl").chmod(0)
        Path(folder).chmod(0o777)
        before = sorted(Path().rglob("*"))
        os.seteuid(65534)
        try:
            code = app.run([*words, "--quiet"])
        finally:
            os.seteuid(0)
        assert sorted(Path().rglob("*")) == before
    said = capfd.readouterr().err
    assert (code, said.count("\n")) == (2, 1) and said.startswith("fastpeft: "), said
    assert "Permission denied" in said or "File name too long" in said or "cannot be read" in said, said


def test_the_program_s_own_errors_are_not_hidden(failing: list[BaseException]) -> None:
    failing.append(FileNotFoundError(2, "No such file or directory", "of our own"))
    with pytest.raises(FileNotFoundError):
        app.run(["generate", "x", "-p", "y"])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(15, "SIGTERM: x was saved"), 143, "SIGTERM: x was saved"),
        (app.UserError("MODEL: expected x, got y"), 2, "MODEL: expected x, got y"),
        (app.RunFailed("it failed"), 1, "it failed"),
        (PermissionError(13, "Permission denied", "closed/m"), 2, "closed/m: Permission denied"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_first_process_of_a_machine_speaks_for_all(
    error: BaseException,
    code: int,
    said: str,
    failing: list[BaseException],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failing.append(error)
    for rank, local, wanted in (("0", "0", f"fastpeft: {said}\n"), ("1", "1", ""), ("8", "0", f"fastpeft: {said}\n")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert app.run(["generate", "x", "-p", "y"]) == code
        assert capsys.readouterr().err == wanted
