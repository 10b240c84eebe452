"""What commands say when they end early: by whom, and what advice."""

from __future__ import annotations

import re

import pytest
import typer

from fastpeft.cli import app
from fastpeft.config_keys import key_of
from fastpeft.errors import Interrupted


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
    assert named and all(key_of(option[2:]) if command == "train" else option in there for option in named)


def test_out_of_memory_is_said_with_the_command_s_own_options(
    failing: list[BaseException], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing.append(OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    monkeypatch.setenv("LOCAL_RANK", "1")  # it may be this process's GPU alone
    assert app.run(["generate", "x", "-p", "y"]) == 1
    wanted = f"out of GPU memory: CUDA out of memory. Less is needed with {app.LESS_MEMORY['generate']}"
    assert capsys.readouterr().err == f"fastpeft: {wanted}\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(15, "SIGTERM: x was saved"), 143, "SIGTERM: x was saved"),
        (app.UserError("MODEL: expected x, got y"), 2, "MODEL: expected x, got y"),
        (app.RunFailed("it failed"), 1, "it failed"),
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
