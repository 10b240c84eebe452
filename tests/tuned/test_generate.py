"""`fastpeft generate`: what it prints, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from fastpeft.cli import app

from .conftest import SHIPPED, write_rows

NEITHER = "expected a model's folder or its ID on the hub, got"
NO_MODEL = "MODEL: expected a folder with adapter_config.json or config.json, got"


def run(*arguments: object) -> int:
    return app.run(["generate", *map(str, arguments), "--max-new-tokens", "8", "--quiet"])


def test_one_prompt_is_answered_on_standard_output(chat_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(chat_run, "--prompt", "Say yes.") == 0
    shown = capsys.readouterr()
    assert shown.out == "yes yes yes\n" and not shown.err


def test_a_checkpoint_answers_too(chat_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(chat_run / "checkpoint-40", "--prompt", "Say yes.") == 0
    assert capsys.readouterr().out == "yes yes yes\n"


def test_the_prompt_may_come_from_standard_input(
    chat_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Say yes.\n"))
    assert run(chat_run) == 0
    assert capsys.readouterr().out == "yes yes yes\n"


def test_several_prompts_give_json_lines_as_each_alone(chat_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["Say yes.", "Now a much longer request than the others are: say yes.", "Yes?"]
    alone = []
    for prompt in prompts:
        assert run(chat_run, "--prompt", prompt) == 0
        alone.append(capsys.readouterr().out.strip())
    assert run(chat_run, *(word for prompt in prompts for word in ("--prompt", prompt)), "--batch-size", 3) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"prompt": p, "completion": a} for p, a in zip(prompts, alone, strict=True)]


def test_prompts_from_files(chat_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("Say yes.\n\nSay yes.\n")
    assert run(chat_run, "--file", tmp_path / "prompts.txt", "--output", tmp_path / "out.jsonl") == 0
    assert not capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == [{"prompt": "Say yes.", "completion": "yes yes yes"}] * 2
    chat = [{"role": "user", "content": "Say yes."}]
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Say yes."}, {"messages": chat}])
    assert run(chat_run, "--file", prompts) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["completion"] for row in rows] == ["yes yes yes"] * 2


def test_sampling_is_the_same_for_the_same_seed(chat_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for seed in (1, 1, 2):
        assert run(chat_run, "-p", "Once", "--raw", "--temperature", 1.5, "--seed", seed) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != found[2]


def test_a_whole_model_continues_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(SHIPPED, "-p", "The") == 0
    assert capsys.readouterr().out.strip()


def test_a_classifier_answers_with_its_classes(classifier_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(classifier_run, "-p", "it is bad") == 0
    first, second = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert (first[0], second[0]) == ("bad", "good")
    assert float(first[1]) > 0.9 and float(first[1]) + float(second[1]) == pytest.approx(1, abs=2e-4)
    assert run(classifier_run, "-p", "it is bad", "-p", "it is good it is good") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in rows] == ["bad", "good"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all", "-p", "x"], f"MODEL: {NEITHER} 'nowhere/at/all', which is neither"),
        (["{empty}", "-p", "x"], f"{NO_MODEL} {{empty}}"),
        (["{stopped}", "-p", "x"], f"{NO_MODEL} {{stopped}}; an unfinished run has {{stopped}}/checkpoint-10"),
        (["{run}", "-p", "x", "--file", "y"], "--file: expected it without --prompt, got both"),
        (["{run}", "--file", "{empty}/y.txt"], "--file: expected a file, got {empty}/y.txt, which is not there"),
        (["{run}", "--file", "{bad}"], "--file: {bad}, line 2: not valid JSON: Expecting value"),
        (["{run}", "--file", "{keys}"], "--file: {keys}, line 1: expected messages, prompt or text, got {{"),
        (["{run}", "-p", "x", "--system", "s", "--raw"], "--system: expected chats, so a model with a chat template"),
        (["{shipped}", "-p", "x", "--base", "y"], "--base: expected none, because {shipped} is a whole model, got y"),
        (["{run}", "-p", "x", "--base", "y/z/a"], f"--base: {NEITHER} 'y/z/a', which is neither"),
        (["{run}", "-p", "x", "--dtype", "float16"], "--dtype: expected float32 or bfloat16 on a CPU, got float16"),
        (["{run}", "-p", "x", "--base", "{encoder}"], "MODEL: {run} does not fit {encoder}: Target modules"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(
    arguments: list[str],
    message: str,
    chat_run: Path,
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for step in (1, 9, 10):
        (tmp_path / f"stopped/checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    (tmp_path / "keys.jsonl").write_text('{"other": 1}\n')
    names = {
        "run": chat_run,
        "shipped": SHIPPED,
        "encoder": encoder,
        "empty": tmp_path / "empty",
        "stopped": tmp_path / "stopped",
        "bad": tmp_path / "bad.jsonl",
        "keys": tmp_path / "keys.jsonl",
    }
    assert run(*(word.format(**names) for word in arguments)) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"fastpeft: {message.format(**names)}") and shown.err.count("\n") == 1
    assert not shown.out
