"""`fastpeft compare` for tasks other than classes: what is measured, and which methods say that they do not serve."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastpeft.errors import UserError
from fastpeft.metrics import multilabel, tokens
from fastpeft.strategies.compare import runner
from fastpeft.strategies.compare.methods import METHODS
from fastpeft.strategies.compare.report import report, table
from fastpeft.strategies.compare.runner import Comparison
from fastpeft.strategies.compare.summary import summarise
from tests.checkpoints import Checkpoints, write_rows
from tests.training.heads import NAMES, PLACES, questions

from .compared import QUIET, configuration, out

pytestmark = pytest.mark.usefixtures("uncollected")
SIZES = {"rates": 1, "seeds": 1, "rows": 16, "validation_rows": 4, "test_rows": 8, "generate": 3}
WORDS = ["red", "sky", "coal", "snow", "dog", "tree", "sun", "cat", "sea", "ice"]


def different(row: Callable[[str, str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """32 rows of words drawn before a name and a place."""
    drawn = random.Random(0)
    return [row(" ".join(drawn.choices(WORDS, k=6)), drawn.choice(NAMES), drawn.choice(PLACES)) for _ in range(32)]


def tags(text: str, name: str, place: str) -> dict[str, Any]:
    return {"tokens": [*text.split(), name, place], "tags": [*"O" * len(text.split()), "B-PER", "B-LOC"]}


def answer(text: str, name: str, place: str) -> dict[str, Any]:
    return {"prompt": f"{text} {name} in?", "completion": f" {place}"}


def labels(text: str, name: str, place: str) -> dict[str, Any]:
    return {"text": f"{text} {name} {place}", "label": [name, place]}


def number(text: str, name: str, place: str) -> dict[str, Any]:
    return {"text": f"{text} {name}", "label": text.count("e") / 4}


def plain(text: str, name: str, place: str) -> dict[str, Any]:
    return {"text": f"{text} {name} {place}"}


def compared(checkpoints: Checkpoints, folder: Path, model: str, row: Any, *methods: str, **options: Any) -> Comparison:
    data = write_rows(folder / "rows.jsonl", *different(row))
    given = SIZES | {"methods": list(methods)} | options
    config = configuration(checkpoints[model], data, folder / "out", "training.max_steps=2", **given)
    return runner.compare(config, QUIET)


def test_an_encoders_tags(checkpoints: Checkpoints, tmp_path: Path) -> None:
    found = compared(checkpoints, tmp_path, "bert", tags, "full", "lora", "prompt", save=True)
    full, lora, prompt = summarise(found)
    assert list(full.figures) == list(lora.figures) == ["F1 of the entities", "accuracy of the words"]
    assert "PEFT has the virtual tokens tagged too" in (prompt.failed or "") and not prompt.figures
    one = found.results[-1]
    counts, words = (np.asarray(one["columns"][name]) for name in ("counts", "words"))
    assert counts.shape == (8, 2, 3) and words.tolist() == [[int(right), 8] for right, _ in words]
    assert one["figures"]["accuracy of the words"] == tokens.accuracy(words) == words[:, 0].sum() / 64
    assert found.measure.baseline() == 1.0, "a name is always a person"
    written = report(found, [full, lora, prompt])
    assert "| F1 of the entities, % | over rows | accuracy of the words, % | against full, points |" in written
    assert "With each word's most frequent tag, F1 of the entities, % would be 100.0." in written
    assert (out(found.config) / "trained" / "lora-1" / "adapter_config.json").is_file()


def test_a_decoders_answers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    found = compared(checkpoints, tmp_path, "llama", answer, "full", "lora", "prompt", "head", "bitfit")
    full, lora, prompt, head, bitfit = summarise(found)
    for row in (full, lora, prompt):
        assert row.failed is None
        assert list(row.figures) == ["loss per token", "exact answers", "F1 of words", "chrF"]
    assert head.failed == "head only does not serve causal-lm: the checkpoint has its head, so nothing would be trained"
    assert bitfit.failed == "BitFit would train nothing of this model: it trains the biases"
    tests = {one["method"]: one for one in found.results if one["phase"] == "test"}
    assert len(tests["lora"]["columns"]["exact answers"]) == 3 and len(tests["lora"]["columns"]["loss"]) == 8
    searched = next(one for one in found.results if one["key"].startswith("search lora"))
    assert list(searched["figures"]) == ["loss per token"] and searched["score"] == -searched["loss"]
    assert len({tuple(one["columns"]["tokens"]) for one in tests.values()}) == 1, "the same tokens for all"
    losses = {row.title: row.figures["loss per token"].value for row in (full, lora, prompt)}
    assert [line.split(" | ")[0][2:] for line in table(found.measure, [full, lora, prompt])[2:]] == sorted(
        losses, key=lambda name: losses[name]
    )


def test_an_encoder_decoders_answers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    found = compared(checkpoints, tmp_path, "t5", answer, "full", "lora", "head")
    full, lora, head = summarise(found)
    assert full.figures["loss per token"].value > 0 and lora.difference is not None
    assert "exact answers" in lora.figures and "does not serve seq2seq-lm" in (head.failed or "")


def test_what_is_said_of_a_task_that_is_not_compared(checkpoints: Checkpoints, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", *questions(16))
    with pytest.raises(UserError, match="to compare methods by, got task question-answering"):
        runner.compare(configuration(checkpoints["bert"], data, tmp_path / "out"), QUIET)


@pytest.mark.full
def test_several_classes_and_numbers(checkpoints: Checkpoints, tmp_path: Path) -> None:
    [row] = summarise(found := compared(checkpoints, tmp_path, "bert", labels, "lora"))
    counts = np.asarray(found.results[-1]["columns"]["counts"])
    assert counts.shape == (8, 5, 3) and row.figures["F1, mean of the classes"].value <= 1
    true = np.asarray(found.splits.test.rows["labels"])
    best = multilabel.best_for_all(np.asarray(found.splits.train.rows["labels"]))
    wanted = 2 * (true * best).sum() / (true.sum() + best.sum() * len(true))
    assert found.measure.baseline() == pytest.approx(wanted)
    (tmp_path / "numbers").mkdir()
    [row] = summarise(found := compared(checkpoints, tmp_path / "numbers", "bert", number, "lora"))
    true, guessed = (np.asarray(found.results[-1]["columns"][name]) for name in ("true", "guessed"))
    assert row.figures["mean absolute error"].value == pytest.approx(np.abs(true - guessed).mean())
    assert -1 <= row.figures["Pearson's correlation"].value <= 1 and found.measure.baseline() is None


NO_HEAD = {"head"}
VIRTUAL = {"prompt", "p-tuning", "prefix", "p-tuning-v2"}
FAILING: dict[tuple[str, Any], set[str]] = {
    ("bert", tags): {"prompt", "p-tuning"},
    ("bert", plain): NO_HEAD | VIRTUAL,
    ("llama", answer): NO_HEAD | {"bitfit"},
    ("llama", plain): NO_HEAD | {"bitfit"},
    ("t5", answer): NO_HEAD | {"bitfit"},
    ("bert", labels): VIRTUAL,  # a pooler is fresh too
    ("llama", number): {"prompt", "p-tuning"},
}


@pytest.mark.full
@pytest.mark.parametrize(("model", "row"), FAILING, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_every_method_is_tested_or_says_why_not(model: str, row: Any, checkpoints: Checkpoints, tmp_path: Path) -> None:
    found = compared(checkpoints, tmp_path, model, row)
    rows = {each.method: each for each in summarise(found)}
    assert rows.keys() == METHODS.keys()
    failed = {name: each.failed for name, each in rows.items() if each.failed}
    assert failed.keys() == FAILING[model, row], failed
