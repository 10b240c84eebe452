"""Few-shot runs: each method learns from a few rows of random models' toy tasks, and what it leaves can be used."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModel, AutoTokenizer

from fastpeft.cli import app
from fastpeft.errors import UserError
from fastpeft.strategies.few_shot.contrastive import pairs
from fastpeft.strategies.few_shot.drawing import Pool, held_back
from fastpeft.strategies.few_shot.heads import LinearHead, centroids, logistic_regression
from fastpeft.strategies.few_shot.t_few import t_few_loss
from fastpeft.strategies.few_shot.worded import answer_log_probabilities
from tests.checkpoints import SHIPPED, Checkpoints, write_rows
from tests.training.runs import Run, adapter, interrupted, train

QUICK = shlex.split("--batch-size 8 --logging-steps 4 --lora.r 8 --report-to none --data.eval-fraction 0.4")
SLOT = "{text} {answer}"
LEARNS = {
    "contrastive": ("bert", "1e-2", 6, {}),
    "classifier": ("bert", "1e-2", 10, {}),
    "pattern": ("bert", "1e-2", 16, {"pattern": SLOT, "verbaliser": {"no": "n", "yes": "y"}, "calibrate": True}),
    "pattern-t5": (
        *("t5", "3e-2", 40),
        {"method": "pattern", "pattern": SLOT, "verbaliser": {"no": "n", "yes": "y"}, "shots": 8},
    ),
    "t-few": ("t5", "1e-1", 40, {"pattern": SLOT, "shots": 8}),
    "t-few-decoder": (SHIPPED, "5e-2", 24, {"method": "t-few", "pattern": SLOT, "demonstrations": 2}),
    "reptile": ("bert", "1e-2", 2, {"novel": ["no", "yes"], "inner_rate": 0.1, "queries": 2, "inner_steps": 2}),
    "fomaml": ("bert", "1e-2", 2, {"novel": ["no", "yes"], "inner_rate": 0.1, "queries": 2, "inner_steps": 2}),
}
"""Model, rate, steps and options with which each learns `letters`."""
SLOW = {"classifier", "pattern-t5", "t-few", "t-few-decoder", "fomaml"}
EACH = [pytest.param(name, marks=pytest.mark.full if name in SLOW else ()) for name in LEARNS]


def letters(classes: int = 2) -> list[dict[str, Any]]:
    """A text begins with four of its class's letter; all texts differ."""
    names = ["no", "yes", "so", "if"][:classes]
    return [{"text": f"{'zaqk'[n % classes] * 4} {n}", "label": names[n % classes]} for n in range(20 * classes)]


def settings(name: str, checkpoints: Checkpoints, data: Path, *more: str, **options: Any) -> list[str]:
    model, rate, steps, own = LEARNS[name]
    classes = 4 if "novel" in own else 2
    path = write_rows(data / f"rows{classes}.jsonl", *letters(classes))
    given = {"method": name, "shots": 4 if classes == 2 else 2} | own | options
    return [
        *("--model", model if model == SHIPPED else checkpoints[model], "--data", path, *QUICK),
        *("--learning-rate", rate, "--max-steps", str(steps), "--strategy.name", "few-shot"),
        *("--strategy.options", json.dumps(given), *more),
    ]


def figures(found: Run) -> dict[str, dict[str, Any]]:
    return {metric["name"]: metric for metric in found.record["findings"]["metrics"]}


@pytest.mark.parametrize("name", EACH)
def test_each_method_learns_from_few_rows(
    name: str, tmp_path: Path, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    """Better than one class for all, whose share is a half; a random model's baselines may be right too."""
    found = train(tmp_path / "run", *settings(name, checkpoints, tmp_path))
    assert name in ("reptile", "fomaml") or found.losses[-1] < 0.7 * found.losses[0]
    accuracy = figures(found)["accuracy"]
    assert accuracy["rows"] == 16 and accuracy["low"] > 0.5
    assert name == "classifier" or accuracy["against"]
    assert app.run(["generate", str(found.folder), "--quiet", "--prompt", "aaaa 99"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].startswith("yes\t"), "likeliest first"


def test_the_adapter_and_its_head_are_those_of_plain_peft(tmp_path: Path, checkpoints: Checkpoints) -> None:
    found = train(tmp_path / "run", *settings("contrastive", checkpoints, tmp_path))
    base = AutoModel.from_pretrained(checkpoints["bert"])
    model = PeftModel.from_pretrained(base, str(found.folder)).eval()
    held = letters()
    batch = AutoTokenizer.from_pretrained(found.folder)([r["text"] for r in held], return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    guessed = LinearHead.load(found.folder).scores(vectors).argmax(-1)
    right = np.mean(guessed == [int(row["label"] == "yes") for row in held])
    assert right == 1 == figures(found)["accuracy"]["value"]
    assert not list(found.folder.glob("*.pkl")) and not list(found.folder.glob("*.joblib"))


@pytest.mark.full
@pytest.mark.parametrize("name", ["contrastive", "pattern", "t-few", "reptile"])
def test_acceleration_changes_nothing(name: str, tmp_path: Path, checkpoints: Checkpoints) -> None:
    slow = ["--learning-rate", "1e-3", "--max-steps", "4"]
    found = train(tmp_path / "run", *settings(name, checkpoints, tmp_path, *slow))
    plain = train(tmp_path / "plain", *settings(name, checkpoints, tmp_path, *slow, "--acceleration.enabled", "false"))
    assert found.losses == pytest.approx(plain.losses, rel=1e-3)
    assert figures(found)["accuracy"]["value"] == pytest.approx(figures(plain)["accuracy"]["value"], abs=0.07)


@pytest.mark.parametrize("name", ["contrastive", pytest.param("reptile", marks=pytest.mark.full)])
def test_a_resumed_run_has_the_numbers_of_one_without_a_break(
    name: str, tmp_path: Path, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(name, checkpoints, tmp_path, "--max-steps", "4", "--save-steps", "1", seeds=2)
    whole = train(tmp_path / "whole", *given)
    interrupted(tmp_path / "broken", *given, at=2)
    other = settings(name, checkpoints, tmp_path, "--max-steps", "4", "--save-steps", "1", seeds=2, shots=3)
    train(tmp_path / "broken", *other, "--resume", code=2)
    assert "strategy.options.shots: expected" in capsys.readouterr().err
    resumed = train(tmp_path / "broken", *given, "--resume")
    ours, theirs = adapter(resumed.folder), adapter(whole.folder)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert resumed.record["findings"] == whole.record["findings"]
    assert "accuracy, mean of 2 draws" in figures(whole)


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("contrastive", {"shots": 30}, "strategy.options.shots: expected at most 12, the different rows of class 'no'"),
        ("contrastive", {"novel": ["no"]}, "strategy.options.novel: expected null for method contrastive"),
        ("contrastive", {"shots": 0}, "strategy.options.shots: expected at least 1, got 0"),
        ("pattern", {"pattern": "{text} It was."}, "strategy.options.pattern: expected the slot {answer} once"),
        ("pattern", {"pattern": "{text} {answer} {x}"}, "slots {text}, {text_pair} and {answer}, got {x}"),
        ("pattern", {"verbaliser": None}, "expected words of one token in the pattern, got 'no' of 2"),
        ("pattern", {"verbaliser": {"no": "y", "yes": "y"}}, "got the same tokens for 'no' and 'yes': 'y'"),
        ("pattern", {"verbaliser": {"no": "n"}}, "expected a word for each class, got none for 'yes'"),
        ("pattern-t5", {"pattern": "{answer} {text}"}, "expected {answer} as the last slot for task seq2seq-lm"),
        ("t-few", {"model": "bert"}, "model.name: expected an encoder-decoder or a decoder"),
        ("reptile", {"novel": ["no"]}, "strategy.options.novel: expected at least two classes"),
        ("reptile", {"ways": 3}, "strategy.options.novel: expected at least 3 other classes to learn from, got 2"),
        ("reptile", {"queries": 30}, "strategy.options.shots: expected at most"),
    ],
)
def test_what_cannot_be(
    name: str,
    given: dict[str, Any],
    said: str,
    tmp_path: Path,
    checkpoints: Checkpoints,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--model", checkpoints[given.pop("model")]] if "model" in given else []
    train(tmp_path / "run", *settings(name, checkpoints, tmp_path, *more, **given), code=2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_models_and_rows_of_another_kind(
    tmp_path: Path, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    masked = settings("pattern", checkpoints, tmp_path, "--model", SHIPPED, "--model.task", "masked-lm")
    train(tmp_path / "run", *masked, code=2)
    assert "expected an encoder with a masked-language head" in capsys.readouterr().err
    one = write_rows(tmp_path / "one.jsonl", *({"text": f"a {n}", "label": "a"} for n in range(9)))
    train(tmp_path / "run", *settings("contrastive", checkpoints, tmp_path, "--data", one), code=2)
    assert "expected 2 to 1000 classes in column label, got one: 'a'" in capsys.readouterr().err
    train(tmp_path / "run", *settings("contrastive", checkpoints, tmp_path, "--eval-steps", "1"), code=2)
    assert "training.eval_steps: expected null for strategy few-shot" in capsys.readouterr().err
    train(tmp_path / "run", "--model", checkpoints["bert"], "--data", one, "--model.task", "feature-extraction", code=2)
    assert "model.task: feature-extraction is for strategy.name few-shot" in capsys.readouterr().err


def test_rows_are_drawn_by_the_seed_and_never_measured() -> None:
    rows = Dataset.from_list([*letters(), {"text": "ZZZZ, 0", "label": "no"}])
    rest, held = held_back(rows, 10, 0, "key")
    assert len(rest) == 30 and len(held) == 10, "the repeated row is not counted"
    pool = Pool(rows, rows.select(held), 0.8)
    first, again, other = (pool.draw(["no", "yes"], 5, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert not {*first} & {*held} and [rows[place]["label"] for place in first] == ["no"] * 5 + ["yes"] * 5
    near = Pool(rows, Dataset.from_list([{"text": "one two three four five", "label": "no"}]), 0.4)
    twin = Dataset.from_list([{"text": "one two three four six", "label": "no"}])
    with pytest.raises(UserError, match="expected at most 0"):
        Pool(twin, Dataset.from_list([{"text": "one two three four five", "label": "no"}]), 0.4).draw(["no"], 1, 0)
    assert near.labels == ["no", "yes"]


def test_pairs_are_alike_or_not() -> None:
    labels = [0, 0, 1, 1, 2]
    drawn = pairs(labels, 3, seed=0)
    assert len(drawn) == 5 * 3 + 4 * 3, "a class of one text has no pairs alike"
    for row in drawn:
        assert row["first"] != row["second"]
        assert row["labels"] == float(labels[row["first"]] == labels[row["second"]])


def test_heads() -> None:
    generator = np.random.default_rng(0)
    vectors, labels = generator.normal(size=(30, 4)).astype(np.float32), np.arange(30) % 3
    vectors[:, 0] += 4 * labels
    distances = ((vectors[:, None] - np.stack([vectors[labels == n].mean(0) for n in range(3)])) ** 2).sum(-1)
    assert (centroids(vectors, labels).scores(vectors).argmax(-1) == distances.argmin(-1)).all()
    from sklearn.linear_model import LogisticRegression

    for kept in (slice(None), labels < 2):
        head, fitted = logistic_regression(vectors[kept], labels[kept]), LogisticRegression(max_iter=1000)
        wanted = fitted.fit(vectors[kept], labels[kept]).predict_proba(vectors[kept])
        scores = np.exp(head.scores(vectors[kept]))
        assert scores / scores.sum(-1, keepdims=True) == pytest.approx(wanted, abs=1e-4)


def test_the_losses_of_t_few() -> None:
    probabilities = torch.tensor([[[0.5, 0.25], [0.1, 1.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    right, wrong = 0.5 * np.log(0.5 * 0.25), np.log(0.1)
    normalised = -right + np.log(np.exp(right) + np.exp(wrong))
    wanted = -right - np.log(1 - 0.1) + normalised
    assert t_few_loss(probabilities.log(), mask, torch.tensor([0])).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("name", "task"), [("t5", "seq2seq-lm"), ("llama", "causal-lm")])
def test_answers_are_as_likely_as_one_by_one(name: str, task: str, checkpoints: Checkpoints) -> None:
    """Against the model's own loss, a prompt and an answer at a time."""
    import transformers

    kind = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForCausalLM"
    model = getattr(transformers, kind).from_pretrained(checkpoints[name]).eval()
    model.get_base_model = lambda: model
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[name])
    prompts, answers = [[40, 41, 42], [50, 51]], [[30, 31], [33]]
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        found, mask = answer_log_probabilities(model, tokenizer, dict(batch), answers, task)
        for row, prompt in enumerate(prompts):
            for column, answer in enumerate(answers):
                ids = torch.tensor([prompt if name == "t5" else prompt + answer])
                labels = torch.tensor([answer if name == "t5" else [-100] * len(prompt) + answer])
                mean = -model(input_ids=ids, labels=labels).loss
                assert found[row, column][mask[column]].mean().item() == pytest.approx(mean.item(), abs=1e-4)
