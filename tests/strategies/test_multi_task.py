"""Multi-task runs: what is learned, shared, logged, compared, merged, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastpeft.errors import UserError
from fastpeft.models import tuned
from fastpeft.strategies.multi_task import alone
from tests.checkpoints import Checkpoints
from tests.training.runs import Run, adapter, interrupted, train

from .tasks import KINDS, arguments, rows, run


def metrics(found: Run) -> dict[str, dict[str, Any]]:
    return {metric["name"]: metric for metric in found.record["findings"]["metrics"]}


def sections(found: Run) -> dict[str, str]:
    return {section["title"]: section["text"] for section in found.record["findings"]["sections"]}


def lora(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in adapter(folder).items() if "lora_" in name}


@pytest.mark.parametrize("methods", [["ties"], pytest.param(["svd", "dare_ties"], marks=pytest.mark.full)])
def test_two_classifiers_with_everything_at_once(methods: list[str], tmp_path: Path, checkpoints: Checkpoints) -> None:
    found = run(
        tmp_path / "run",
        checkpoints,
        *("--lora.alpha", "8", "--max-steps", "30"),
        adapters="both",
        shared_rank=2,
        sampling="loss",
        weighting="uncertainty",
        gradients="sum",
        alone=True,
        merge={"methods": methods},
    )
    assert sum(found.losses[-3:]) < 0.75 * sum(found.losses[:3])
    for task, (_, labels, count) in KINDS.items():
        accuracy = metrics(found)[f"{task}: accuracy"]
        assert accuracy["rows"] == count // 4 and accuracy["low"] > accuracy["baseline"], (
            "better than one class for all"
        )
        base = AutoModelForSequenceClassification.from_pretrained(checkpoints["bert"], num_labels=len(labels))
        model = PeftModel.from_pretrained(base, str(found.folder / task)).eval()
        named = sorted(labels)
        texts = [row["text"] for row in rows(task)]
        tokens = AutoTokenizer.from_pretrained(found.folder / task)(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            guessed = [named[number] for number in model(**tokens).logits.argmax(-1)]
        right = [guess == row["label"] for guess, row in zip(guessed, rows(task), strict=True)]
        assert sum(right) / count > 0.8, "plain PEFT loads each task's adapter and head"
        source = tuned.find(str(found.folder / task))
        assert source.labels == named and source.task == "sequence-classification"
    first, second = (lora(found.folder / task) for task in KINDS)
    for name, value in first.items():
        axis = 0 if "lora_A" in name else 1
        shared, own = (each.narrow(axis, start, length) for each in (value,) for start, length in ((0, 2), (2, 4)))
        assert torch.equal(shared, second[name].narrow(axis, 0, 2)), "the first ranks are the tasks' in common"
        assert not torch.equal(own, second[name].narrow(axis, 2, 4))
    together = sections(found)["Together and alone"]
    assert "| ends | " in together and "| moods | " in together
    trained = [int(line.split("|")[3]) for line in sections(found)["Tasks"].splitlines()[2:4]]
    assert sum(trained) == 3 * (24 + 36) + 6 * 8, "three epochs of 8 steps, whose last has 4 rows, and 6 steps"
    assert "ends, moods" in sections(found)["Conflicts"]
    assert metrics(found)[f"ends, {methods[-1]}: accuracy, difference"]["against"] == "its own adapter"
    for method in methods:
        source = tuned.find(str(found.folder / "merged" / method / "moods"))
        assert source.labels == sorted(KINDS["moods"][1]) and source.max_length is not None
    apart = ", ".join(str(found.folder / task) for task in KINDS)
    with pytest.raises(UserError, match=f"; adapters are in {apart}$"):
        tuned.find(str(found.folder))
    config = json.loads((found.folder / "ends" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 12), "the factor is lora.alpha / lora.r, whatever the rank"


@pytest.mark.full
@pytest.mark.parametrize("adapters", ["shared", "per-task", "both"])
@pytest.mark.parametrize("model", ["bert", "llama", "t5"])
def test_acceleration_changes_nothing_but_the_rounding(
    model: str, adapters: str, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    slow = ["--learning-rate", "3e-3", "--max-steps", "6"]
    fast, plain = (
        run(tmp_path / on, checkpoints, *slow, "--acceleration.enabled", on, model=model, adapters=adapters)
        for on in ("true", "false")
    )
    assert fast.losses == pytest.approx(plain.losses, rel=1e-3)
    report = (fast.folder / "report.md").read_text()
    assert "by PEFT" not in report and "adapter layers accelerated" in report


@pytest.mark.parametrize("model", ["llama", pytest.param("t5", marks=pytest.mark.full)])
def test_language_models_learn_both_tasks(model: str, tmp_path: Path, checkpoints: Checkpoints) -> None:
    found = run(tmp_path / "run", checkpoints, model=model, generate=2 if model == "t5" else 0)
    part = {"llama": 0.5, "t5": 0.7}[model]  # T5 begins with random values: it learns the answers' letters, not which
    assert found.losses[-1] < part * found.losses[0]
    assert not [note for note in found.record["notes"] if "labels" in note], "the model is given none, the loss is ours"
    for task in KINDS:
        loss = metrics(found)[f"{task}: loss per token"]
        assert loss["high"] < loss["baseline"] and loss["against"] == "before training"
    first, second = (lora(found.folder / task) for task in KINDS)
    assert all(torch.equal(value, second[name]) for name, value in first.items()), "one adapter for both"


@pytest.mark.full
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_resumed_run_is_one_without_a_break(model: str, tmp_path: Path, checkpoints: Checkpoints) -> None:
    options = {"adapters": "both", "sampling": "loss", "weighting": "uncertainty", "window": 2}
    more = ["--logging-steps", "1", "--save-steps", "100", "--max-steps", "14", "--lora.dropout", "0.1"]
    given = arguments(tmp_path / "whole", checkpoints, *more, model=model, **options)
    whole = train(tmp_path / "whole", *given)
    interrupted(tmp_path / "cut", *given, at=9)
    cut = train(tmp_path / "cut", "--resume")
    assert cut.losses == whole.losses and cut.record["findings"] == whole.record["findings"]
    for task in KINDS:
        ours, theirs = adapter(cut.folder / task), adapter(whole.folder / task)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    place = given.index("--strategy.options") + 1
    other = json.dumps(json.loads(given[place]) | {"weighting": "dwa"})
    train(tmp_path / "cut", "--resume", *given[:place], other, *given[place + 1 :], code=2)


@pytest.mark.full
def test_the_best_of_all_adapters_is_kept(tmp_path: Path, checkpoints: Checkpoints) -> None:
    best = ["--training.extra", '{"load_best_model_at_end": true}', "--eval-steps", "1", "--save-steps", "1"]
    found = run(tmp_path / "run", checkpoints, *best, "--max-steps", "4", "--learning-rate", "1", adapters="per-task")
    losses = dict(found.record["evaluation"])
    step = min(losses, key=lambda step: losses[step])
    assert step < 4 and losses[step] < losses[4], "a rate at which training fails"
    for task in KINDS:
        ours, theirs = adapter(found.folder / task), adapter(found.folder / f"checkpoint-{step}" / task)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.full
def test_tasks_alone_go_on_where_they_were_broken_off(
    tmp_path: Path, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(tmp_path / "whole", checkpoints, "--max-steps", "4", alone=True)
    whole = train(tmp_path / "whole", *given)
    trained, original = list[int](), alone.train_alone

    def counted(*of: Any) -> Any:
        if len(trained) == 1:
            monkeypatch.setattr(alone, "train_alone", original)
            raise KeyboardInterrupt
        trained.append(1)
        return original(*of)

    monkeypatch.setattr(alone, "train_alone", counted)
    train(tmp_path / "cut", *given, code=130)
    (one,) = alone.read(tmp_path / "cut")
    assert one == next(iter(KINDS))
    stored = (tmp_path / "cut" / "alone.json").read_text()
    cut = train(tmp_path / "cut", "--resume")
    assert cut.record["findings"] == whole.record["findings"]
    assert alone.read(cut.folder)[one] == alone.Alone(**json.loads(stored)[one]) and len(alone.read(cut.folder)) == 2
    # of other rows, it is trained again
    changed = json.loads(stored)
    changed[one]["measured"][0].reverse()
    changed[one]["measured"][0].append(0)
    (cut.folder / "alone.json").write_text(json.dumps(changed))
    assert train(tmp_path / "cut", "--resume").record["findings"] == whole.record["findings"]
