"""Distillation of all three kinds of model: what is learned of whom, what is stored and said, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from fastpeft.config import FastpeftConfig, ModelSection
from fastpeft.errors import UserError
from fastpeft.layers import head_call
from fastpeft.models import tuned
from fastpeft.models.tasks import auto_class
from fastpeft.strategies.distillation import matching, projection, report, stored, strategy, student, teacher
from fastpeft.strategies.registry import strategy_of
from tests.checkpoints import Checkpoints, write_rows
from tests.fresh import ROOT
from tests.training.runs import Run, adapter, classes, completions, interrupted, texts, train

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
    layer = model.bert.encoder.layer[1]
    for part in (layer.attention.self.query, layer.attention.self.key, layer.intermediate.dense, layer.output.dense):
        part.weight.data *= 10  # random layers are otherwise all alike
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoints["bert"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few there are."""
    monkeypatch.setattr(head_call, "FEW_ON_CPU", 0)


@pytest.fixture(scope="module")
def half(sure: str, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A decoder whose student is its first layer."""
    more = options(student_layers=2, labels_weight=0.0)
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(head_call, "FEW_ON_CPU", 0)
        return train(folder, "--model", sure, "--data", data["completions"], *QUICK, *more, "--max-steps", "10")


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


def test_a_classifier_matches_hidden_states_and_attentions(judge: str, data: dict[str, str], tmp_path: Path) -> None:
    more = options(student_layers=2, hidden_weight=1.0, attention_weight=1.0, layer_map="[1]", labels_weight=0.0)
    run = train(tmp_path / "run", "--model", judge, "--data", data["classes"], *QUICK, *more, "--max-steps", "5")
    assert run.losses[-1] < run.losses[0] and run.config["model"]["attention"] == "eager"
    assert "accuracy" in (run.folder / "report.md").read_text()
    base = AutoModelForSequenceClassification.from_pretrained(run.folder / "student")
    assert PeftModel.from_pretrained(base, str(run.folder)).get_base_model().config.num_hidden_layers == 1


@pytest.fixture(scope="module")
def taught(sure: str, data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter of the sure decoder."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("taught")
    base = AutoModelForCausalLM.from_pretrained(sure)
    settings = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(folder)
    return str(folder)


@pytest.mark.full
def test_another_adapter_of_the_same_weights_teaches(
    sure: str, taught: str, data: dict[str, str], tmp_path: Path, no_logits: None
) -> None:
    more = options(teacher=taught, labels_weight=0.0)
    arguments = ["--model", sure, "--data", data["completions"], *QUICK, *more, "--max-steps", "10"]
    run = train(tmp_path / "run", *arguments)
    assert run.losses[-1] < run.losses[0]
    assert (
        not (run.folder / "teacher").exists()
        and "an adapter of the student's base" in (run.folder / "report.md").read_text()
    )
    names = [name for name, _ in run.model.named_parameters() if ".lora_A.teacher." in name]
    theirs = tuned.attach(tuned.find(taught), AutoModelForCausalLM.from_pretrained(sure))
    parts = dict(theirs.named_parameters())
    assert names and len({id(part) for part in run.model.parameters()}) == len(list(run.model.parameters()))
    for name in names:  # it is never trained
        torch.testing.assert_close(run.model.get_parameter(name), parts[name.replace(".teacher.", ".default.")])


@pytest.fixture(scope="module")
def wide(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder with the vocabulary of the tiny one, wider and deeper."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(2)
    settings = AutoModelForCausalLM.from_pretrained(checkpoints["llama"]).config
    settings.hidden_size, settings.intermediate_size, settings.num_hidden_layers = 128, 192, 3
    settings.head_dim = 64
    model = LlamaForCausalLM(settings)
    model.lm_head.weight.data *= 4
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoints["llama"]).save_pretrained(folder)
    return str(folder)


@pytest.mark.full
def test_a_teacher_in_four_bits_and_packed_rows(
    sure: str, wide: str, data: dict[str, str], tmp_path: Path, no_logits: None
) -> None:
    more = options(teacher=wide, teacher_quantization="nf4", labels_weight=0.0)
    arguments = ["--model", sure, "--data", data["texts"], *QUICK, *more, "--packing", "--max-steps", "3"]
    fast, plain = (train(tmp_path / on, *arguments, "--acceleration.enabled", on) for on in ("true", "false"))
    torch.testing.assert_close(torch.tensor(fast.losses), torch.tensor(plain.losses), rtol=1e-4, atol=1e-4)
    assert fast.losses[-1] < fast.losses[0] and " in nf4, the student " in (fast.folder / "report.md").read_text()


RESUMED: dict[str, dict[str, Any]] = {
    "wide": {"teacher": "wide", "hidden_weight": 1.0, "attention_weight": 1.0},
    "half": {"student_layers": 2},
    "stored": {"student_layers": 2, "top_k": 8},
    "own answers": {"teacher": "base", "on_policy": 0.5, "max_new_tokens": 4},
    "adapter": {"teacher": "taught", "beta": 0.5},
}


@pytest.mark.full
@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_is_one_without_a_break(
    kind: str, sure: str, taught: str, wide: str, data: dict[str, str], tmp_path: Path
) -> None:
    folders: dict[Any, str] = {"taught": taught, "wide": wide}
    given = {name: folders.get(value, value) for name, value in RESUMED[kind].items()}
    arguments = ["--model", sure, "--data", data["completions"], *QUICK, *options(**given), "--lora.dropout", "0.1"]
    arguments += ["--epochs", "2", "--save-steps", "100"]
    whole = train(tmp_path / "whole", *arguments)
    interrupted(tmp_path / "cut", *arguments, at=4)
    changed = ["--strategy.options.temperature", "3"]
    train(tmp_path / "cut", *arguments, *changed, "--resume", code=2)
    cut = train(tmp_path / "cut", "--resume")
    assert cut.losses == whole.losses
    ours, theirs = adapter(cut.folder), adapter(whole.folder)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def config(model: str, path: str, **given: Any) -> FastpeftConfig:
    settings = {"name": "distillation", "options": given}
    return FastpeftConfig.from_dict({"model": model, "data": {"path": path, "max_length": 32}, "strategy": settings})


class TestStoredLogits:
    @pytest.mark.full
    def test_are_written_once(self, sure: str, data: dict[str, str], tmp_path: Path, no_logits: None) -> None:
        file = tmp_path / "logits" / "teacher.safetensors"
        more = options(student_layers=2, top_k=8, stored=file)
        arguments = ["--model", sure, "--data", data["completions"], *QUICK, *more, "--max-steps", "1"]
        first = train(tmp_path / "first", *arguments)
        written = file.stat().st_mtime_ns
        again = train(tmp_path / "again", *arguments)
        assert file.stat().st_mtime_ns == written and again.losses == first.losses
        assert "| loss per token |" in (again.folder / "report.md").read_text().partition("Teacher and student")[2]

    def test_tell_what_they_are_of(self, sure: str, data: dict[str, str], tmp_path: Path, no_logits: None) -> None:
        file = tmp_path / "logits" / "teacher.safetensors"
        more = options(student_layers=2, top_k=8, stored=file)
        train(tmp_path / "run", "--model", sure, "--data", data["completions"], *QUICK, *more, "--max-steps", "1")
        settings = config(sure, data["completions"], student_layers=2, top_k=8, stored=str(file))
        settings = settings.override(["data.eval_fraction=0.25"])
        strategy_of(settings).prepare(Console(quiet=True))
        for change, message in (
            ("data.max_length=16", r"expected logits of data\.max_length 16, got 32 in "),
            ("data.limit=20", r"expected logits of the rows of data\.path, got another in "),
            ("strategy.options.top_k=4", r"expected logits of top_k 4, got 8 in "),
            (
                "strategy.options.teacher_quantization=nf4",
                r"expected logits of strategy\.options\.teacher, got an",
            ),
        ):
            with pytest.raises(UserError, match=rf"strategy\.options\.stored: {message}"):
                strategy_of(settings.override([change])).prepare(Console(quiet=True))
        own = settings.override(["strategy.options.stored=null", f"training.output_dir={file.parent}", "data.limit=20"])
        strategy_of(own).prepare(Console(quiet=True))  # a former run's, which this one's replaces
        file.write_bytes(b"no tensors")
        with pytest.raises(UserError, match=r"strategy\.options\.stored: .* cannot be read"):
            strategy_of(settings).prepare(Console(quiet=True))

    @pytest.mark.full
    def test_another_run_in_the_folder_writes_its_own(self, sure: str, data: dict[str, str], tmp_path: Path) -> None:
        more = options(student_layers=2, top_k=8)
        arguments = ["--model", sure, "--data", data["completions"], *QUICK, *more, "--max-steps", "1"]
        train(tmp_path / "run", *arguments)
        train(tmp_path / "run", *arguments, "--strategy.options.top_k", "4", "--overwrite")
        with safe_open(tmp_path / "run" / stored.FILE, "pt") as file:
            assert file.get_tensor("logits").shape[1] == 4

    def test_what_does_not_fit_is_never_indexed(self, tmp_path: Path) -> None:
        rows = Dataset.from_list(
            [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [-100]}]
        )
        about = stored.fingerprints(SimpleNamespace(fingerprint=lambda: "rows"), "teacher", 2, 8)  # type: ignore[arg-type]
        batches = [{"labels": torch.tensor([row["labels"] + [-100] * (3 - len(row["labels"]))])} for row in rows]
        padded = torch.cat([torch.randn(1, 3, 5), torch.full((1, 3, 2), 99.0)], -1)  # words that pad a vocabulary
        file = tmp_path / "teacher.safetensors"
        stored.write(file, about, rows, 2, 5, batches, lambda _: padded, shifted=True)
        given = stored.StoredTeacher(file, about, rows, 5).of([rows[0]])
        assert int(given.words.max()) < 5
        torch.testing.assert_close(given.logits[:, 0], torch.zeros(2))
        wanted = padded[0, :2, :5].topk(2).values
        torch.testing.assert_close(given.logits[:, 1], wanted[:, 1] - wanted[:, 0], atol=1e-3, rtol=1e-3)
        whole = load_file(file)
        for name, value, message in (
            ("words", whole["words"] + 5, "expected words below 5"),
            ("words", whole["words"][:1], "expected logits and words"),
            ("logits", whole["logits"] * torch.nan, "expected finite logits"),
            ("logits", whole["words"].clone(), "expected floating logits"),
            ("starts", whole["starts"].flip(0), "expected starts that ascend"),
            ("starts", whole["starts"][:2], "expected logits and words"),
        ):
            save_file({**whole, name: value.contiguous()}, file, {**about, "format": stored.FORMAT})
            with pytest.raises(UserError, match=rf"strategy\.options\.stored: .* cannot be read: {message}"):
                stored.StoredTeacher(file, about, rows, 5)

    def test_figures_of_a_teacher_that_are_none(self) -> None:
        side = report.Side(3, 1.0, 0.5, 8, {"loss per token": 2.0})
        assert report.read_side(json.dumps(vars(side))) == side
        for text in ("", "[]", "{}", json.dumps(vars(side) | {"quality": 3}), json.dumps(vars(side) | {"mib": "x"})):
            assert report.read_side(text) is None

    def test_other_weights_are_another_teacher(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(bytes(100))
        before = stored.fingerprint([str(tmp_path)], "none")
        assert stored.fingerprint([str(tmp_path)], "none") == before != stored.fingerprint([str(tmp_path)], "nf4")
        (tmp_path / "model.safetensors").write_bytes(bytes(99) + b"1")
        assert stored.fingerprint([str(tmp_path)], "none") != before


class TestTheStudentsFolder:
    def test_is_made_anew_of_other_weights(self, sure: str, tmp_path: Path) -> None:
        source, folder = tmp_path / "source", tmp_path / "run" / "student"
        shutil.copytree(sure, source)
        tokenizer = AutoTokenizer.from_pretrained(sure)
        given = (ModelSection(name=str(source)), "causal-lm", 2, folder, tokenizer, 0)
        student.make(*given, may_replace=True)
        first = load_file(folder / "model.safetensors")
        student.make(*given, may_replace=False)  # a run that goes on
        changed = load_file(source / "model.safetensors")
        save_file({name: value + 1 for name, value in changed.items()}, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"--resume: expected .*source as .*student was made of it, got other"):
            student.make(*given, may_replace=False)
        student.make(*given, may_replace=True)
        second = load_file(folder / "model.safetensors")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name] + 1, second[name]) for name in first)

    def test_another_folder_of_that_name_stays(self, sure: str, tmp_path: Path) -> None:
        (tmp_path / "student").mkdir()
        (tmp_path / "student" / "thesis.txt").write_text("years of work")
        given = (ModelSection(name=sure), "causal-lm", 2, tmp_path / "student", AutoTokenizer.from_pretrained(sure), 0)
        with pytest.raises(UserError, match=r"training\.output_dir: expected a folder without another's student in it"):
            student.make(*given, may_replace=True)
        assert (tmp_path / "student" / "thesis.txt").read_text() == "years of work"


def test_each_side_is_counted_without_the_other(sure: str, taught: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(sure)
    values = base.num_parameters()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    own = sum(part.numel() for part in model.parameters() if part.requires_grad)
    assert report.size_of(model, teacher.SameBase(model, None).has)[0] == values
    both = teacher.SameBase(model, taught)
    theirs = sum(value.numel() for value in adapter(Path(taught)).values())
    assert report.size_of(model, both.has)[0] == values + theirs
    model.add_module(projection.PROJECTION, torch.nn.Linear(2, 2))
    assert report.size_of(model, strategy._is_students)[0] == values + own


def test_a_checkpoint_with_another_projection_is_refused(tmp_path: Path) -> None:
    matrix = torch.nn.Linear(4, 8, bias=False)
    model = torch.nn.Module()
    model.device = torch.device("cpu")  # type: ignore[assignment]
    for given, message in (
        ({"weight": torch.zeros(4, 4)}, r"expected weight of shape \(8, 4\), got \(4, 4\)"),
        ({"other": torch.zeros(8, 4)}, "cannot be read: 'weight'"),
    ):
        save_file(given, tmp_path / projection.FILE)
        with pytest.raises(UserError, match=rf"--resume: .*{message}"):
            projection.KeptProjection(model, matrix, tmp_path)


@pytest.mark.full
def test_a_streamed_teacher_says_the_same(
    sure: str, wide: str, data: dict[str, str], tmp_path: Path, no_logits: None
) -> None:
    arguments = ["--model", sure, "--data", data["completions"], *QUICK, "--max-steps", "3"]
    kept = train(tmp_path / "kept", *arguments, *options(teacher=wide))
    streamed = train(tmp_path / "streamed", *arguments, *options(teacher=wide, teacher_streamed=True))
    torch.testing.assert_close(torch.tensor(streamed.losses), torch.tensor(kept.losses), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"teacher: expected a model, an adapter or 'base', got null without student_layers"),
        ({"teacher": "base", "student_layers": 2}, r"teacher: expected null with student_layers"),
        ({"teacher": "base", "teacher_streamed": True}, r"teacher_streamed: expected none with teacher 'base'"),
        ({"teacher": "base", "beta": 2.0}, r"beta: expected 0 to 1, got 2\.0"),
        ({"teacher": "base", "temperature": 0.0}, r"temperature: expected more than 0, got 0\.0"),
        ({"teacher": "base", "hidden_weight": -1.0}, r"hidden_weight: expected at least 0, got -1\.0"),
        ({"teacher": "base", "top_k": -1}, r"top_k: expected at least 0, got -1"),
        ({"teacher": "base", "labels_weight": 1.0}, r"labels_weight: expected less than 1, got 1"),
        ({"teacher": "base", "layer_map": [0]}, r"layer_map: expected null without hidden_weight or attention_weight"),
        ({"teacher": "base", "stored": "x"}, r"stored: expected null with top_k 0, got 'x'"),
        ({"teacher": "base", "student_of": "x"}, r"student_of: expected null without student_layers, got 'x'"),
        ({"teacher": "base", "top_k": 4, "beta": 1.0}, r"beta: expected less than 1 with top_k"),
        ({"teacher": "base", "top_k": 4, "on_policy": 0.5}, r"on_policy: expected 0 with top_k, because what the"),
        ({"student_layers": 1}, r"student_layers: expected at least 2, every second layer, got 1"),
        ({"student_layers": [1, 0]}, r"student_layers: expected numbers from 0 on in ascending order, got \[1, 0\]"),
        ({"student_layers": [0, 2]}, r"student_layers: expected layers below 2, which is how many .* got 2"),
        ({"student_layers": [0, 1]}, r"student_layers: expected to leave out some of the model's 2 layers, got all"),
        ({"student_layers": 2, "hidden_weight": 1.0, "layer_map": [2]}, r"layer_map: expected layers from 0 to 1 of"),
        ({"student_layers": 2, "hidden_weight": 1.0, "layer_map": [0, 1]}, r"layer_map: expected 1 of the teacher's"),
        ({"teacher": "nowhere/at/all"}, r"teacher: expected a model's folder or its ID on the hub"),
    ],
)
def test_options_that_cannot_be(
    given: dict[str, Any], message: str, checkpoints: Checkpoints, data: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=rf"strategy\.options\.{message}"):
        strategy_of(config(checkpoints["llama"], data["completions"], **given)).prepare(Console(quiet=True))


class TestTeachersThatCannotBe:
    def test_a_folder_without_an_adapter(self, checkpoints: Checkpoints, data: dict[str, str], tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"strategy\.options\.teacher: expected a folder with adapter_config\.json"):
            strategy_of(config(checkpoints["llama"], data["texts"], teacher=str(tmp_path))).prepare(Console(quiet=True))

    def test_another_vocabulary(self, checkpoints: Checkpoints, data: dict[str, str], tmp_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
        tokenizer.add_tokens(["<other>"])
        AutoModelForCausalLM.from_pretrained(checkpoints["llama"]).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        number = len(tokenizer) - 1
        message = rf"got 1 in .* that are not, such as '<other>' \(-, {number}\) .* learn them by strategy task"
        with pytest.raises(UserError, match=message):
            strategy_of(config(checkpoints["llama"], data["texts"], teacher=str(tmp_path))).prepare(Console(quiet=True))

    def test_another_task_or_other_classes(self, checkpoints: Checkpoints, data: dict[str, str], judge: str) -> None:
        settings = config(checkpoints["llama"], data["texts"], teacher=checkpoints["bert"])
        with pytest.raises(UserError, match=r"teacher: expected a model for task causal-lm, got .*, which is Bert"):
            strategy_of(settings).prepare(Console(quiet=True))
        settings = config(judge, data["classes"], teacher=checkpoints["bert-classifier"])
        with pytest.raises(UserError, match=r"teacher: expected the classes a, b in this order, .* got LABEL_0, LA"):
            strategy_of(settings).prepare(Console(quiet=True))

    def test_rows_that_it_cannot_answer_for(self, checkpoints: Checkpoints, data: dict[str, str]) -> None:
        settings = config(checkpoints["llama"], data["texts"], teacher="base", on_policy=0.5)
        with pytest.raises(UserError, match=r"on_policy: expected rows with a prompt and an answer to it"):
            strategy_of(settings).prepare(Console(quiet=True))
        settings = config(checkpoints["bert"], data["texts"], teacher="base", top_k=4)
        with pytest.raises(UserError, match=r"top_k: expected 0 for texts under task masked-lm"):
            strategy_of(settings.override(["model.task=masked-lm"])).prepare(Console(quiet=True))


def test_layers_are_spread_evenly_and_the_last_matches_the_last() -> None:
    assert matching.layer_map(None, 4, 12) == [2, 5, 8, 11]
    assert matching.layer_map(None, 2, 2) == [0, 1] and matching.layer_map([1, 0], 2, 2) == [1, 0]
    assert matching.layer_map(None, 4, 2)[-1] == 1


@pytest.mark.full
def test_two_processes_learn_as_one(sure: str, data: dict[str, str], tmp_path: Path) -> None:
    shared = ["train", "--quiet", "--model", sure, "--data", data["completions"], *QUICK, "--lora.dropout", "0"]
    shared += [*options(student_layers=2, labels_weight=0.3), "--max-steps", "4"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [*launch, "-m", "fastpeft", *shared, "--batch-size", "2", "--output-dir", str(tmp_path / "two")],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one = train(tmp_path / "one", *shared[2:])
    assert Run(tmp_path / "two", None).losses == pytest.approx(one.losses, rel=1e-4)
