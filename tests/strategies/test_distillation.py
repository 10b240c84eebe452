"""Distillation of all three kinds of model: what is learned of whom, what is stored and said, and what is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.layers import head
from fastpeft.models import tuned
from fastpeft.models.tasks import auto_class
from fastpeft.strategies.distillation import matching, stored, teacher
from fastpeft.strategies.registry import strategy_of
from tests.checkpoints import Checkpoints, write_rows
from tests.training.runs import SAYINGS, Run, adapter, classes, completions, interrupted, texts, train

QUICK = shlex.split(
    "--batch-size 4 --learning-rate 1e-2 --logging-steps 1 --lora.r 4 --report-to none --max-length 32 "
    "--strategy.name distillation --data.eval_fraction 0.25"
)
TASKS = {"llama": "causal-lm", "bert": "masked-lm", "t5": "seq2seq-lm", "marian": "seq2seq-lm"}


def options(**given: Any) -> list[str]:
    return [part for name, value in given.items() for part in (f"--strategy.options.{name}", str(value))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths by the kind of row."""
    folder = tmp_path_factory.mktemp("rows")
    kinds = {"completions": completions(24), "texts": texts(24), "classes": classes(24)}
    return {name: write_rows(folder / f"{name}.jsonl", *rows) for name, rows in kinds.items()}


@pytest.fixture(scope="module")
def sure(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny decoder with a head that makes it sure of what it says, which its student is to become."""
    folder = tmp_path_factory.mktemp("sure")
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    model.lm_head.weight.data *= 8
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def judge(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny classifier that is sure of its classes."""
    folder = tmp_path_factory.mktemp("judge")
    model = AutoModelForSequenceClassification.from_pretrained(checkpoints["bert-classifier"])
    model.config.id2label, model.config.label2id = {0: "a", 1: "b"}, {"a": 0, "b": 1}
    model.classifier.weight.data *= 100
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoints["bert"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few there are."""
    monkeypatch.setattr(head, "FEW_ON_CPU", 0)


@pytest.fixture(scope="module")
def half(sure: str, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A decoder whose student is its first layer."""
    more = options(student_layers=2, labels_weight=0.0)
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(head, "FEW_ON_CPU", 0)
        return train(folder, "--model", sure, "--data", data["completions"], *QUICK, *more, "--max-steps", "16")


class TestALayerLess:
    def test_the_student_comes_nearer_to_its_teacher(self, half: Run) -> None:
        # random weights: what is learned is what the teacher says of these sayings, which is learnable
        found = {metric["name"]: metric for metric in half.record["findings"]["metrics"]}
        apart = found["divergence from the teacher, nats a token"]
        assert half.losses[-1] < half.losses[0] / 2 and apart["high"] < apart["baseline"]
        assert apart["against"] == "before training"

    def test_no_logits_are_made(self, half: Run) -> None:
        report = (half.folder / "report.md").read_text()
        assert "1 of 1 losses without logits" in report and "logits asked for" not in report

    def test_the_report_has_both_sides(self, half: Run) -> None:
        report = (half.folder / "report.md").read_text()
        assert "| | teacher | student before | student after |" in report
        assert f"the student layers 0 of 2 of `{Path(half.config['strategy']['options']['student_of']).name}`" in report

    def test_the_adapter_loads_in_plain_peft_on_the_student(self, half: Run) -> None:
        folder = half.folder / "student"
        base = AutoModelForCausalLM.from_pretrained(folder)
        assert base.config.num_hidden_layers == len(base.model.layers) == 1
        assert json.loads((half.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
        ids = torch.arange(8)[None]
        loaded = tuned.load(tuned.find(str(half.folder)), torch.device("cpu"), torch.float32)
        with torch.no_grad():
            wanted = half.model.eval()(input_ids=ids).logits
            for model in (PeftModel.from_pretrained(base, str(half.folder)).eval(), loaded):
                torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)

    def test_the_kept_configuration_is_that_of_the_student(self, half: Run, sure: str) -> None:
        assert half.config["model"]["name"] == str(half.folder / "student")
        again = strategy_of(FastpeftConfig.from_dict(half.config))
        prepared = again.prepare(Console(quiet=True))
        assert prepared.config.model.name == sure
        assert again.kept(prepared.config).to_dict() == half.config


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "marian"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_acceleration_changes_nothing_but_the_rounding(
    name: str, beta: float, data: dict[str, str], checkpoints: Checkpoints, tmp_path: Path, no_logits: None
) -> None:
    rows, task = data["texts" if name == "bert" else "completions"], ["--model.task", TASKS[name]]
    more = options(student_layers="[0]", beta=beta, temperature=2.0, labels_weight=0.3)
    arguments = ["--model", checkpoints[name], "--data", rows, *QUICK, *task, *more, "--max-steps", "4"]
    fast, plain = (train(tmp_path / on, *arguments, "--acceleration.enabled", on) for on in ("true", "false"))
    torch.testing.assert_close(torch.tensor(fast.losses), torch.tensor(plain.losses), rtol=1e-4, atol=1e-4)
    base = auto_class(TASKS[name]).from_pretrained(fast.folder / "student")
    assert PeftModel.from_pretrained(base, str(fast.folder)).peft_config["default"].r == 4


def test_a_classifier_matches_hidden_states_and_attentions_and_an_adapter_teaches(
    judge: str, data: dict[str, str], tmp_path: Path
) -> None:
    more = options(student_layers=2, hidden_weight=1.0, attention_weight=1.0, layer_map="[1]", labels_weight=0.0)
    run = train(tmp_path / "run", "--model", judge, "--data", data["classes"], *QUICK, *more, "--max-steps", "12")
    assert run.losses[-1] < run.losses[0] and run.config["model"]["attention"] == "eager"
    assert "accuracy" in (run.folder / "report.md").read_text()
    base = AutoModelForSequenceClassification.from_pretrained(run.folder / "student")
    assert PeftModel.from_pretrained(base, str(run.folder)).get_base_model().config.num_hidden_layers == 1
