"""The command line itself: its options, its exit codes, what it loads."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

import fastpeft
from fastpeft.cli import app
from fastpeft.config_keys import keys
from fastpeft.errors import UserError
from tests.fresh import run_fresh


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["--version"]) == 0
    assert capsys.readouterr().out == f"fastpeft {fastpeft.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_lists_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "--version" in shown and "quickstart" in shown


def test_help_of_quickstart_lists_its_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert app.run(["quickstart", "--help"]) == 0
    shown = capsys.readouterr().out
    wanted = "model text held-out steps batch-size sequence-length rank learning-rate quantization dtype seed output"
    assert not [name for name in wanted.split() if not re.search(rf"--{name}\b", shown)]


@pytest.mark.parametrize("columns", [60, 80, 109, 110, 200])
def test_help_of_train_cuts_no_name(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert app.run(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and not [key for key in keys() if f" --{key} " not in shown]


@pytest.mark.parametrize("command", ["train", "generate", "merge", "verify", "memorization", "groups", "doctor"])
def test_help_breaks_its_lines_for_the_terminal(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert app.run([command, "--help"]) == 0
    text = re.split(r".*(?:Arguments|Options)\b", capsys.readouterr().out.partition("[OPTIONS]")[2])[0]
    for line, following in pairwise(line.strip() for line in text.splitlines()):
        assert not line or not following or len(f"{line} {following.split()[0]}") > 76


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nope"], "No such option: --nope"),
        (["nope"], "No such command 'nope'"),
        (["quickstart", "--step", "3"], "No such option: --step"),
        (["quickstart", "--steps", "few"], "Invalid value for '--steps'"),
        (["quickstart", "--dtype", "float8"], "Invalid value for '--dtype'"),
        (["quickstart", "--steps", "1"], "--steps: expected at least 2, got 1\n"),
        (["quickstart", "--batch-size", "0"], "--batch-size: expected at least 1, got 0\n"),
        (["quickstart", "--learning-rate", "0"], "--learning-rate: expected more than 0, got 0.0\n"),
        (["quickstart", "--text", "a.txt"], "--held-out: expected a file, because --text was given, got none\n"),
        (["quickstart", "--held-out", "a.txt"], "--text: expected a file, because --held-out was given, got none\n"),
        (["quickstart", "--output", "README.md"], "--output: expected a folder or a new name, got a file: README.md\n"),
    ],
)
def test_a_wrong_command_line_is_one_line_on_stderr_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.md").touch()
    assert app.run(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"fastpeft: {message}") and shown.err.count("\n") == 1 and not shown.out


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UserError("--text: expected\nmore"), 2, "fastpeft: --text: expected more\n"),
        (KeyboardInterrupt(), 130, "fastpeft: interrupted\n"),
    ],
)
def test_what_a_command_raises(
    raised: BaseException,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(settings: object) -> bool:
        raise raised

    monkeypatch.setattr("fastpeft.quickstart.comparing.run", fail)
    assert app.run(["quickstart"]) == code
    assert capsys.readouterr().err == message


def test_a_failed_check_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastpeft.quickstart.comparing.run", lambda settings: False)
    assert app.run(["quickstart"]) == 1


@pytest.mark.parametrize("arguments", [["--help"], ["quickstart", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
from fastpeft.cli.app import run
assert run({arguments!r}) == 0
heavy = {{"torch", "triton", "transformers", "peft", "bitsandbytes", "matplotlib", "numpy"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    run_fresh(code)


def test_python_m_is_the_command() -> None:
    code = "import runpy\nsys.argv[1:] = ['--version']\nrunpy.run_module('fastpeft', run_name='__main__')"
    assert run_fresh(code) == f"fastpeft {fastpeft.__version__}\n"
