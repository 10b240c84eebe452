"""Task-adaptive runs: what is learned, what the report says of it, and what each option does."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.checkpoints import SHIPPED, Checkpoints, write_rows
from tests.training.runs import Run, adapter, classes, interrupted, train

QUICK = shlex.split("--batch-size 8 --logging-steps 4 --lora.r 8 --report-to none")
LEARNS = {"bert": ("1e-2", 12), "llama": ("1e-2", 16), "t5": ("3e-2", 30)}
"""Rate and steps at which each learns `first_letters`."""


def first_letters(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Every second text begins with other letters; all texts differ."""
    return [
        {"text": f"{'za'[number % 2] * 4} {number}", "label": ("no", "yes")[number % 2]}
        for number in range(start, count)
    ]


def write_completions(folder: Path) -> None:
    """The rows of `data`, as prompts and completions."""
    for name, rows in (("train", first_letters(24)), ("test", first_letters(36, 24))):
        write_rows(
            folder / f"{name}.jsonl", *({"prompt": row["text"], "completion": f" {row['label']}"} for row in rows)
        )


def options(**given: Any) -> list[str]:
    return ["--strategy.options", json.dumps(given)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """24 rows to train on and 12 others."""
    (tmp_path / "rows").mkdir()
    write_rows(tmp_path / "rows" / "train.jsonl", *first_letters(24))
    write_rows(tmp_path / "rows" / "test.jsonl", *first_letters(36, 24))
    return tmp_path / "rows"


def run(folder: Path, checkpoints: Checkpoints, data: Path, *more: str, model: str = "bert", code: int = 0) -> Run:
    rate, steps = LEARNS[model]
    settings = ["--learning-rate", rate, "--max-steps", str(steps), *QUICK, *more]
    name = SHIPPED if model == "llama" else checkpoints[model]  # a random head of so many tokens would learn for long
    return train(folder, "--model", name, "--data", str(data), "--eval-split", "test", *settings, code=code)


def metrics(found: Run) -> dict[str, dict[str, Any]]:
    return {metric["name"]: metric for metric in found.record["findings"]["metrics"]}


def sections(found: Run) -> dict[str, str]:
    return {section["title"]: section["text"] for section in found.record["findings"]["sections"]}


def plain_logits(found: Run, checkpoints: Checkpoints, texts: list[str]) -> Any:
    """(rows, classes), of the saved adapter in plain PEFT."""
    base = AutoModelForSequenceClassification.from_pretrained(checkpoints["bert"], num_labels=2)
    model = PeftModel.from_pretrained(base, str(found.folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    with torch.no_grad():
        return model(**tokenizer(texts, return_tensors="pt", padding=True)).logits


def test_a_classifier_learns_with_every_option_at_once(tmp_path: Path, data: Path, checkpoints: Checkpoints) -> None:
    wanted = options(
        class_weights="balanced",
        early_stopping=5,
        layer_rate_decay=0.9,
        rate_search={"rates": [1e-8, 1e-2], "steps": 6},
        validation_fraction=0.25,
        leaks="error",
        near_duplicates=0.9,
    )
    found = run(tmp_path / "run", checkpoints, data, "--eval-steps", "6", *wanted)
    assert found.losses[-1] < 0.5 * found.losses[0]
    accuracy = metrics(found)["accuracy"]
    assert accuracy["rows"] == 12 and accuracy["baseline"] == 0.5
    assert accuracy["low"] > 0.5, "better than one class for all"
    assert metrics(found)["accuracy: change by training"]["low"] > 0
    assert found.record["rows"] == 18 and found.record["evaluation"], "a quarter of the training rows is held back"
    search = sections(found)["Learning-rate search"].splitlines()
    assert "| 0.01 |" in search[3] and search[3].endswith("| taken |"), "the better of two rates"
    rates = [float(line.split("|")[2]) for line in sections(found)["Learning rates by layer"].splitlines()[2:]]
    assert rates == pytest.approx([1e-2, 9e-3, 8.1e-3]), "the rate that was found, at the head"
    rows = first_letters(36, 24)
    named = ["no", "yes"]
    guessed = [named[number] for number in plain_logits(found, checkpoints, [row["text"] for row in rows]).argmax(-1)]
    right = [guess == row["label"] for guess, row in zip(guessed, rows, strict=True)]
    assert sum(right) / 12 == accuracy["value"], "plain PEFT has the same"
    report = (found.folder / "report.md").read_text()
    assert "## Result" in report and "## Confusion" in report and "the training rows' most frequent class" in report


def test_what_learns_nothing_is_noticed_and_stopped(tmp_path: Path, checkpoints: Checkpoints) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("train", "test"):
        write_rows(tmp_path / "rows" / f"{name}.jsonl", *classes(24))
    still = ["--learning-rate", "0", "--eval-steps", "1"]
    found = run(tmp_path / "run", checkpoints, tmp_path / "rows", *still, *options(early_stopping=2))
    assert found.record["steps"] == 3, "the first evaluation is the best; two more wait for a better one"
    assert metrics(found)["F1, mean of the classes"]["value"] == pytest.approx(1 / 3), "it takes all for one class"
    notes = found.record["notes"]
    assert any("for every row of the evaluation: it has learned nothing" in note for note in notes)
    assert any(
        "24 rows (1, 2, 3, 4, 5, …) of the evaluation's 24 have a text that is trained on" in note for note in notes
    )
    assert any("repeat an earlier training row" in note for note in notes)


@pytest.mark.parametrize("model", ["llama", pytest.param("t5", marks=pytest.mark.full)])
def test_answers_are_learned_and_beat_the_most_frequent_one(
    model: str, tmp_path: Path, data: Path, checkpoints: Checkpoints
) -> None:
    write_completions(data)
    found = run(tmp_path / "run", checkpoints, data, model=model)
    assert found.losses[-1] < 0.5 * found.losses[0]
    assert metrics(found)["loss per token"]["high"] < metrics(found)["loss per token"]["baseline"]
    answers = metrics(found)["exact answers"]
    assert answers["baseline"] == 0.5 and answers["low"] > 0.5


@pytest.mark.full
@pytest.mark.parametrize("model", ["bert", "llama", "t5"])
def test_figures_are_those_of_plain_peft(model: str, tmp_path: Path, data: Path, checkpoints: Checkpoints) -> None:
    if model != "bert":
        write_completions(data)
    slow = ["--learning-rate", "3e-3", "--max-steps", "8"]  # a high rate makes other runs of other roundings
    found = run(tmp_path / "run", checkpoints, data, *slow, model=model)
    plain = run(tmp_path / "plain", checkpoints, data, *slow, "--acceleration.enabled", "false", model=model)
    assert found.losses == pytest.approx(plain.losses, rel=1e-3)
    assert metrics(plain).keys() == metrics(found).keys()
    for name, metric in metrics(plain).items():
        assert metrics(found)[name]["value"] == pytest.approx(metric["value"], rel=1e-3, abs=1e-3), name


@pytest.mark.full
def test_the_loss_has_the_weights(tmp_path: Path, data: Path, checkpoints: Checkpoints) -> None:
    still = ["--learning-rate", "0", "--batch-size", "12", "--per-device-eval-batch-size", "12"]
    found = run(tmp_path / "run", checkpoints, data, *still, *options(class_weights={"yes": 5.0}))
    rows = first_letters(36, 24)
    logits = plain_logits(found, checkpoints, [row["text"] for row in rows])
    labels = torch.tensor([int(row["label"] == "yes") for row in rows])
    wanted = torch.nn.functional.cross_entropy(logits, labels, weight=torch.tensor([1.0, 5.0]))
    assert found.record["metrics"]["loss"] == pytest.approx(wanted.item(), abs=1e-5)
    assert wanted.item() != pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-3)


@pytest.mark.full
def test_a_search_changes_nothing_but_the_rate(tmp_path: Path, data: Path, checkpoints: Checkpoints) -> None:
    held = {"early_stopping": 50, "validation_fraction": 0.25}
    search = {"rates": [1e-6, 1e-2], "steps": 5}
    found = run(tmp_path / "found", checkpoints, data, "--learning-rate", "5", *options(**held, rate_search=search))
    given = run(tmp_path / "given", checkpoints, data, "--learning-rate", "1e-2", *options(**held))
    assert found.losses == given.losses
    ours, theirs = adapter(found.folder), adapter(given.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.full
def test_measuring_changes_nothing(tmp_path: Path, data: Path, checkpoints: Checkpoints) -> None:
    dropout = ["--lora.dropout", "0.3"]
    found = [
        run(tmp_path / name, checkpoints, data, *dropout, *options(before=before)).losses
        for name, before in (("one", True), ("other", False))
    ]
    assert found[0] == found[1]


@pytest.mark.full
def test_early_stopping_keeps_the_best_and_resumes_as_if_without_a_break(
    tmp_path: Path, data: Path, checkpoints: Checkpoints
) -> None:
    write_rows(
        data / "train.jsonl", *({**row, "label": "yes"} if n % 3 else row for n, row in enumerate(first_letters(24)))
    )
    settings = [
        *("--model", checkpoints["bert"], "--data", str(data), "--eval-split", "test", *QUICK),
        *("--learning-rate", "5e-2", "--max-steps", "40", "--eval-steps", "2", "--training.save-total-limit", "50"),
        *options(early_stopping=2, validation_fraction=0.25),
    ]
    whole = train(tmp_path / "whole", *settings)
    assert whole.record["steps"] < 40
    losses = dict(whole.record["evaluation"])
    best = min(losses, key=lambda step: losses[step])
    assert best == whole.record["steps"] - 4
    kept, saved = adapter(whole.folder / f"checkpoint-{best}"), adapter(whole.folder)
    assert all(torch.equal(kept[name], saved[name]) for name in saved)

    interrupted(tmp_path / "broken", *settings, at=best + 3)
    resumed = train(tmp_path / "broken", *settings, "--resume")
    assert resumed.record["evaluation"] == whole.record["evaluation"]
    assert resumed.record["steps"] == whole.record["steps"]
    ours = adapter(resumed.folder)
    assert all(torch.equal(ours[name], saved[name]) for name in saved)

    again = train(tmp_path / "whole", *settings, "--resume")
    assert again.record["steps"] == whole.record["steps"], "it had ended"
    ours = adapter(again.folder)
    assert all(torch.equal(ours[name], saved[name]) for name in saved)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"class_weights": {"yep": 2.0}}, "strategy.options.class_weights: expected classes of no, yes, got 'yep'"),
        ({"early_stopping": 0}, "strategy.options.early_stopping: expected at least 1, got 0"),
        ({"generate": -1}, "strategy.options.generate: expected at least 0, got -1"),
        ({"layer_rate_decay": 1.5}, "strategy.options.layer_rate_decay: expected more than 0 and less than 1, got 1.5"),
        ({"early_stopping": 1, "validation_fraction": 0.99}, "validation_fraction: expected at least one row"),
        ({"rate_search": {}}, "strategy.options.rate_search: expected either rates, or low and high"),
        ({"classweights": "balanced"}, "strategy.options.classweights: unknown key"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_options_that_cannot_be(
    given: dict[str, Any],
    said: str,
    tmp_path: Path,
    data: Path,
    checkpoints: Checkpoints,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(tmp_path / "run", checkpoints, data, *options(**given), code=2)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_rows_that_are_trained_on_can_be_an_error(
    tmp_path: Path, data: Path, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(data / "test.jsonl", {"text": "ZZZZ  0", "label": "no"})
    run(tmp_path / "run", checkpoints, data, *options(leaks="error"), code=2)
    assert "strategy.options.leaks: 1 row (1) of the evaluation's 1 have a text that is" in capsys.readouterr().err


def test_weights_are_for_classes(
    tmp_path: Path, data: Path, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(data / "train.jsonl", {"text": "a b"})
    write_rows(data / "test.jsonl", {"text": "c d"})
    run(tmp_path / "run", checkpoints, data, *options(class_weights="balanced"), model="llama", code=2)
    assert "class_weights: expected null for task causal-lm, got balanced" in capsys.readouterr().err
