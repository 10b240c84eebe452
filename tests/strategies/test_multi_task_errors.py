"""What multi-task training refuses, before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.strategies.registry import strategy_of
from tests.checkpoints import Checkpoints, write_rows
from tests.training.runs import classes, completions, texts

TWO = {"one": {"path": "one.jsonl"}, "two": {"path": "two.jsonl"}}


def config(*settings: str, **options: Any) -> FastpeftConfig:
    given = json.dumps({"tasks": TWO} | options)
    return FastpeftConfig().override(["strategy.name=multi-task", f"strategy.options={given}", *settings])


def refused(message: str, *settings: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        strategy_of(config(*settings, **options))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": {"one": {}}}, "strategy.options.tasks: expected at least two tasks, got 1"),
        (
            {"tasks": {"One": {}, "one": {}}},
            "expected each name once, in small letters or capitals, got 'One' and 'one'",
        ),
        ({"tasks": {"a b": {}, "c": {}}}, "expected names of letters, digits, - and _, got 'a b'"),
        ({"tasks": {"default": {}, "c": {}}}, "expected another name, which no run has itself, got 'default'"),
        ({"tasks": {"a": {"pth": "x"}, "c": {}}}, "strategy.options.tasks.a.pth: unknown key, did you mean"),
        (
            {"sampling": "sizes"},
            "strategy.options.sampling: expected one of 'size', 'temperature', 'loss', got 'sizes'",
        ),
        ({"weights": {"tow": 1.0}}, "strategy.options.weights: expected tasks of one, two, got 'tow'"),
        ({"weights": {"two": 0.0}}, "strategy.options.weights.two: expected a number above 0, got 0.0"),
        ({"ranks": {"two": 4}}, "strategy.options.ranks: expected none for adapters shared, got two"),
        ({"shared_rank": 4}, "strategy.options.shared_rank: expected null for adapters shared, got 4"),
        ({"window": 1}, "strategy.options.window: expected at least 2, got 1"),
        ({"temperature": 0.0}, "strategy.options.temperature: expected a finite number above 0, got 0.0"),
        ({"adapters": "per-task", "gradients": "pcgrad"}, "gradients: expected sum for tasks that share nothing"),
        ({"merge": {"methods": ["ties"]}}, "merge: expected null for adapters shared, which are one already"),
        (
            {"adapters": "per-task", "ranks": {"two": 4}, "merge": {"methods": ["svd", "ties"]}},
            "merge.methods: ties expected adapters of one rank, got one 16, two 4; cat, svd and those that end in _svd",
        ),
        ({"adapters": "per-task", "merge": {"methods": ["tie"]}}, "did you mean 'ties'?"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_options(options: dict[str, Any], message: str) -> None:
    refused(message, **options)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora.use_dora=true", "lora.use_dora: expected False under multi-task, got True"),
        ("lora.bias=all", "lora.bias: expected none under multi-task, got all"),
        ("lora.modules_to_save=[norm]", "lora.modules_to_save: expected none under multi-task"),
        ("lora.init_lora_weights=pissa", "lora.init_lora_weights: expected True or False or gaussian or orthogonal"),
        ("lora.extra={lora_bias: true}", "lora.extra.lora_bias: expected none under multi-task, got True"),
        ("training.extra={label_smoothing_factor: 0.1}", "label_smoothing_factor: expected 0 under multi-task"),
    ],
)
def test_other_settings(setting: str, message: str) -> None:
    refused(message, setting)


def test_a_task_that_comes_twice_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("strategy:\n  options:\n    tasks:\n      one: {path: a}\n      one: {path: b}\n")
    with pytest.raises(ValueError, match="one"):
        FastpeftConfig.from_yaml(path)


class TestData:
    def prepared(self, model: str, tasks: dict[str, Any], **options: Any) -> Any:
        given = json.dumps({"tasks": tasks} | options)
        settings = [f"model.name={model}", "strategy.name=multi-task", f"strategy.options={given}"]
        return strategy_of(FastpeftConfig().override(settings)).prepare(Console(quiet=True))

    def refused(self, message: str, model: str, tasks: dict[str, Any], **options: Any) -> None:
        with pytest.raises(UserError) as caught:
            self.prepared(model, tasks, **options)
        assert message in str(caught.value)

    def test_what_tasks_must_have_in_common(self, tmp_path: Path, checkpoints: Checkpoints) -> None:
        bert = checkpoints["bert"]
        kinds = {"ab": classes(), "texts": texts(), "none": []}
        kinds["xyz"] = [{"text": f"{n}", "label": "xyz"[n % 3]} for n in range(6)]
        path = {name: {"path": write_rows(tmp_path / f"{name}.jsonl", *rows)} for name, rows in kinds.items()}
        ab, xyz = path["ab"], path["xyz"]
        message = "strategy.options.tasks.two: data.path: expected at least one row, got an empty file"
        self.refused(message, bert, {"one": ab, "two": path["none"]})
        message = "expected tasks for one kind of head (model.task), got one sequence-classification, two masked-lm"
        self.refused(message, bert, {"one": ab, "two": path["texts"]})
        message = (
            "head: shared expected the same labels in the same order, got a, b for one, x, y, z for two; data.labels"
        )
        self.refused(message, bert, {"one": ab, "two": xyz}, head="shared")
        message = "strategy.options.tasks.two: data: row 1, column label: expected one of p, q, got 'x'"
        self.refused(message, bert, {"one": ab, "two": xyz | {"labels": ["p", "q"]}})
        found = self.prepared(bert, {"one": ab, "two": xyz | {"limit": 5}})
        assert list(found.rows.rows["task"]) == [0] * 12 + [1] * 5
        assert found.config.strategy.options["tasks"]["two"]["labels"] == ["x", "y", "z"], "all is resolved"

    def test_language_models(self, tmp_path: Path, checkpoints: Checkpoints) -> None:
        pairs = {"path": write_rows(tmp_path / "pairs.jsonl", *completions())}
        message = "strategy.options.head: expected per-task for task causal-lm, whose head no task trains, got shared"
        self.refused(message, checkpoints["llama"], {"one": pairs, "two": pairs}, head="shared")
        message = "strategy.options.tasks.two.packing: expected false, got true"
        self.refused(message, checkpoints["llama"], {"one": pairs, "two": pairs | {"packing": True}})
        message = "strategy.options.tasks: expected one eos_token for all tasks, got one '</s>', two '<unk>'"
        tokens = [pairs | {"eos_token": token} for token in ("</s>", "<unk>")]
        self.refused(message, checkpoints["t5"], dict(zip(("one", "two"), tokens, strict=True)))
