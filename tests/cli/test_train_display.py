"""What `fastpeft train` shows: for people on stderr, the result on stdout; and what the shell completes."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fastpeft.cli import app
from fastpeft.progress import count
from tests.checkpoints import Checkpoints, write_rows
from tests.commands import run
from tests.fresh import ROOT

ROWS = [{"text": f"some words, and {number} more"} for number in range(8)]
RESULT = r"out: {steps} steps, loss \d\.\d{{3}} to \d\.\d{{3}}(, evaluation loss \d\.\d{{3}})?(, [\d,]+ tokens/s)?\n"
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def settings(tmp_path: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    rows = write_rows("texts.jsonl", *ROWS)
    return ["train", "--model", checkpoints["llama"], "--data", rows, "--batch-size", "2", "--output-dir", "out"]


def test_lines_without_a_terminal(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    held = write_rows("held.jsonl", *ROWS)
    answer = run(capsys, *settings, "--epochs", "3", "--logging-steps", "2", "--eval-path", held)
    assert answer.code == 0 and re.fullmatch(RESULT.format(steps=12), answer.out)
    shown = re.sub(r"\d+\.\d{3}", "0.000", re.sub(r"\d+ s$", "0 s", answer.err, flags=re.MULTILINE))
    steps = [f"training: step {step}/12, loss 0.000, 0 s" for step in (1, 2, 4, 6, 8, 10, 12)]
    for after, evaluated in ((2, 1), (4, 2), (7, 3)):
        steps.insert(after + evaluated, "training: evaluation loss 0.000")
    known = "note: 8 rows (1, 2, 3, 4, 5, …) of the evaluation's 8 have a text that is trained on: they measure memory"
    assert shown.splitlines() == ["reading the data", "loading the model", known, *steps, "report: out/report.md"]


def test_a_quiet_run_shows_no_warnings_of_its_own(
    settings: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    settings += ["--max-steps", "1", "--lora.extra.alora_invocation_tokens", "[5, 6]"]
    answer = run(capsys, *settings, "--quiet")
    assert (answer.code, answer.err, caplog.text) == (0, "", "")
    assert "fastpeft: 0 of 14 adapter layers accelerated" in Path("out/report.md").read_text()
    assert run(capsys, *settings, "--overwrite").code == 0
    assert "nothing but attention, loss and norms was replaced in this PeftModelForCausalLM" in caplog.text


def test_a_bar_on_a_terminal_is_gone_when_all_is_read() -> None:
    shown = io.StringIO()
    with count(Console(file=shown, force_terminal=True, width=80), "reading the data", 8) as seen:
        seen(4)
    assert "reading the data" in shown.getvalue() and shown.getvalue().endswith("\x1b[2K")
    for quiet, text in ((False, "reading the data\n"), (True, "")):
        shown = io.StringIO()
        with count(Console(file=shown, quiet=quiet), "reading the data", 8) as seen:
            seen(4)
        assert shown.getvalue() == text


def test_quiet_shows_nothing_but_the_result(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, *settings, "-q", "--max-steps", "3")
    assert (answer.code, answer.err) == (0, "") and re.fullmatch(RESULT.format(steps=3), answer.out)


def test_the_last_steps_are_logged_whatever_logging_steps_is(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = run(capsys, *settings, "-q", "--max-steps", "3", "--logging-steps", "50", "--learning-rate", "1e-2")
    first, last = re.findall(r"\d\.\d{3}", answer.out)[:2]
    assert float(last) < float(first)


def test_a_dry_run_prints_the_configuration_and_writes_nothing(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = run(capsys, *settings, "--dry-run", "--lora.r", "3")
    said = "reading the data\ndata: 8 rows (72 tokens; 0 cut, 0 left out)\n"
    assert (answer.code, answer.err) == (0, said)
    (tmp_path / "run.yaml").write_text(answer.out)
    again = run(capsys, "train", "run.yaml", "--dry-run", "--max-length", "3")
    assert again.err == "reading the data\ndata: 8 rows (24 tokens; 8 cut, 0 left out)\n"
    again = run(capsys, "train", "run.yaml", "--dry-run")
    assert again.out == answer.out and "  r: 3\n" in again.out and "  task: causal-lm\n" in again.out
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl", "run.yaml"}


def test_a_file_and_options_are_the_same(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--lora.r", "3", "--lora.dropout=0.1", "--packing", "--learning-rate", "1e-3", "--labels", "[a, b]"]
    wanted = run(capsys, *settings, "--dry-run", *given).out
    Path("run.yaml").write_text(
        f"model: {settings[2]}\n"
        "data: {path: texts.jsonl, packing: yes, labels: [a, b]}\n"
        "lora: {r: 3, dropout: .1}\n"
        "training: {learning_rate: 1e-3, per_device_train_batch_size: 2, output_dir: out}\n"
    )
    assert run(capsys, "train", "run.yaml", "--dry-run").out == wanted


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--output-dir", "2024"], "output_dir: '2024'"),
        (["--data.columns.text", "text"], "columns:\n    text: text\n"),
        (["--training.extra.neftune_noise_alpha", "5"], "extra:\n    neftune_noise_alpha: 5\n"),
        (["--packing", "yes"], "packing: true"),
        (["--packing", "--double-quant", "false"], "double_quant: false"),
        (["--double-quant=off"], "double_quant: false"),
        (["--max-length", "12", "--max-length", "13"], "max_length: 13"),
        (["--max_length=null"], "max_length: 128"),
    ],
)
def test_forms_of_options(given: list[str], line: str, settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    answer = run(capsys, *settings, "--dry-run", *given)
    assert answer.code == 0 and line in answer.out


@pytest.mark.full
def test_a_process_without_terminal_and_input(settings: list[str]) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-m", "fastpeft", *settings, "--max-steps", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "TERM": "xterm-256color"},
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(RESULT.format(steps=2), done.stdout)
    lines = [
        "reading the data",
        "loading the model",
        "training: step 1/2",
        "training: step 2/2",
        "report: out/report.md",
    ]
    assert [line.partition(", loss")[0] for line in done.stderr.splitlines()] == lines
    assert "\x1b" not in done.stdout + done.stderr


def completed(words: str) -> set[str]:
    """What the shell offers at the end of a line."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from fastpeft.cli import main; sys.argv[0] = 'fastpeft'; main()"],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "_FASTPEFT_COMPLETE": "complete_bash"}
        | {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)},
    )
    assert not done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("fastpeft tr", {"train"}),
        ("fastpeft train --ov", {"--overwrite"}),
        ("fastpeft train --lora.u", {"--lora.use_rslora", "--lora.use_dora"}),
        ("fastpeft train --lora.r 8 --memory.g", {"--memory.gradient_checkpointing"}),
        ("fastpeft train --learning-rate 1e-3 --data.pac", {"--data.packing"}),
        ("fastpeft train --nope 8 --data.pac", {"--data.packing"}),
        ("fastpeft train --lora.r --data.pac", {"--data.packing"}),
    ],
)
def test_the_shell_completes_keys(words: str, offered: set[str]) -> None:
    assert completed(words) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_for_completion(
    shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_FASTPEFT_COMPLETE", f"source_{shell}")
    with pytest.raises(SystemExit) as ended:
        app.run([])
    assert ended.value.code == 0 and f"_FASTPEFT_COMPLETE=complete_{shell}" in capsys.readouterr().out
