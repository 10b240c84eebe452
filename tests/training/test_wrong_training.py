"""`fastpeft train` says what goes wrong in a training, and keeps it in the report; unknown tokens are refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpeft.config import FastpeftConfig
from fastpeft.strategies.registry import strategy_of
from tests.checkpoints import Checkpoints, write_rows
from tests.commands import run as command

from .runs import completions, train

QUICK = shlex.split("--batch-size 4 --max-steps 4 --lora.r 2 --report-to none --max-length 32")


@pytest.fixture
def checkpoint(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """To be broken, with a tokenizer that has one token more than the model."""
    AutoModelForCausalLM.from_pretrained(checkpoints["llama"]).save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    missing = base.config.vocab_size - len(tokenizer) + 1
    tokenizer.add_tokens([f"<new{number}>" for number in range(missing)])
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_notice_is_kept_in_the_report(checkpoint: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", *completions())
    found = train(tmp_path / "run", "--model", str(checkpoint), "--data", rows, *QUICK)
    [note] = [note for note in found.record["notes"] if note.startswith("the tokenizer has ")]
    assert f"Note: {note}." in (tmp_path / "run" / "report.md").read_text()


def test_a_token_that_the_model_does_not_know(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = AutoModelForCausalLM.from_pretrained(checkpoint).config.vocab_size
    token = AutoTokenizer.from_pretrained(checkpoint).convert_ids_to_tokens(vocabulary)
    rows = write_rows(tmp_path / "rows.jsonl", *completions(3), {"prompt": "so", "completion": token})
    answer = command(
        capsys, "train", "--model", str(checkpoint), "--data", rows, "--output-dir", str(tmp_path / "run"), *QUICK
    )
    assert answer.code == 2 and answer.err.rstrip().endswith(
        f"model.name: expected a tokenizer of the model, which knows {vocabulary} tokens, got one with token "
        f"{vocabulary} ({token!r}), as in row 4 of data"
    )
    assert not (tmp_path / "run").exists()


def test_a_broken_weight_is_named(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(checkpoint)
    rows = write_rows(tmp_path / "rows.jsonl", *completions())
    answer = command(
        capsys, "train", "--model", str(checkpoint), "--data", rows, "--output-dir", str(tmp_path / "run"), *QUICK
    )
    assert answer.code == 1 and "no adapter was saved" in answer.err
    assert "the frozen parameter base_model.model.model.layers.1.mlp.up_proj" in answer.err


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("task", {}),
        ("dynamic", {"rules": [{"action": "freeze", "below": 0.99, "start": 2, "every": 1}]}),
        ("distillation", {"teacher": "same"}),
        ("multi-task", {}),
    ],
)
def test_every_strategy_says_that_it_evaluates_on_what_is_trained_on(
    strategy: str, options: dict[str, object], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", *completions(4))
    held = write_rows(tmp_path / "held.jsonl", *completions(2), {"prompt": "another", "completion": " one"})
    data = {"path": rows, "eval_path": held, "max_length": 32}
    given = [f"model.name={checkpoints['llama']}", f"strategy.name={strategy}"]
    if strategy == "multi-task":
        options = {"tasks": {"one": data, "two": data}}
    else:
        given += [f"data.{name}={value}" for name, value in data.items()]
    if strategy == "distillation":
        options = {"teacher": checkpoints["llama"]}
    config = FastpeftConfig().override([*given, f"strategy.options={json.dumps(options)}"])
    notes = strategy_of(config).prepare(Console(quiet=True)).notes
    said = "2 rows (1, 2) of the evaluation's 3 have a text that is trained on: they measure memory"
    assert [note for note in notes if "trained on" in note] == (
        [f"one: {said}", f"two: {said}"] if strategy == "multi-task" else [said]
    )
