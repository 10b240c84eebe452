"""What memory is planned for a run with several adapters, or with a teacher, beside what such a run holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastpeft.config import FastpeftConfig
from fastpeft.errors import UserError
from fastpeft.memory.plan.predicting import Model, Setting
from fastpeft.memory.policy import LayerPolicy
from fastpeft.models.bases import load_config
from fastpeft.strategies.base import Strategy
from fastpeft.strategies.registry import strategy_of
from fastpeft.strategies.run import check_run
from tests.checkpoints import Checkpoints, write_rows
from tests.training.runs import completions

from . import tasks

BLOCK = 512
"""Bytes of which a GPU's allocator hands out multiples."""


def config(folder: Path, model: str, name: str, **options: Any) -> FastpeftConfig:
    given: dict[str, Any] = {
        "model": {"name": model},
        "training": {"output_dir": str(folder / "run"), "report_to": "none"},
        "strategy": {"name": name, "options": options},
    }
    if name == "distillation":
        given["data"] = {"path": write_rows(folder / "rows.jsonl", *completions()), "max_length": 32}
    return FastpeftConfig.from_dict(given)


def planned(given: FastpeftConfig) -> tuple[Strategy, Setting, Any]:
    """The strategy, what it plans for, and the data."""
    strategy = strategy_of(given)
    prepared = strategy.prepare(Console(quiet=True))
    task = prepared.config.model.task
    setting = Setting(load_config(given.model), task, 16, 2, False, torch.float32, given.lora)
    return strategy, strategy.planned(setting), prepared


def held(tensors: Any) -> int:
    return sum(-(-tensor.nbytes // BLOCK) * BLOCK for tensor in tensors)


@pytest.mark.parametrize("adapters", ["shared", pytest.param("both", marks=pytest.mark.full)])
def test_each_task_has_an_adapter_and_what_follows_no_state(
    adapters: str, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    options = {"tasks": tasks.write(tmp_path, "bert"), "adapters": adapters}
    strategy, setting, prepared = planned(config(tmp_path, checkpoints["bert-classifier"], "multi-task", **options))
    plan = Model(setting)
    model = strategy.load(prepared, torch.device("cpu"), torch.float32)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert plan.gradients == pytest.approx(held(trained.values()), rel=0.01), "heads differ by their classes"
    _, second = options["tasks"]
    followers = [name for name in trained if adapters == "shared" and "lora_" in name and f".{second}." in name]
    stateful = held(each for name, each in trained.items() if name not in followers)
    assert plan.optimizer == pytest.approx(2 * stateful, rel=0.01)


class TestTeacher:
    @pytest.fixture
    def half(self, tmp_path: Path, checkpoints: Checkpoints) -> FastpeftConfig:
        return config(tmp_path, checkpoints["llama"], "distillation", student_layers=2)

    def test_its_weights_and_what_it_says_have_room(self, half: FastpeftConfig) -> None:
        strategy, setting, _ = planned(half)
        taught, alone = Model(setting), Model(replace(setting, teacher=None))
        teacher = strategy._choice.load(torch.device("cpu"), torch.float32).model  # type: ignore[attr-defined]
        assert taught.bytes["teacher"] == pytest.approx(held([*teacher.parameters(), *teacher.buffers()]), rel=0.01)
        assert "teacher" not in alone.bytes
        assert setting.config.num_hidden_layers == 1 and setting.teacher is not None, "half of the layers"
        assert setting.teacher.config.num_hidden_layers == 2
        steps = [each.peak((LayerPolicy(),), setting.rows, setting.tokens).size for each in (taught, alone)]
        hidden = setting.rows * setting.tokens * setting.config.hidden_size * setting.dtype.itemsize
        assert steps[0] >= steps[1] + hidden

    @pytest.mark.full
    def test_stored_in_four_bits_or_in_host_memory(self, half: FastpeftConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("bitsandbytes")
        monkeypatch.setattr("fastpeft.memory.plan.predicting.SMALLEST", 0)
        packed = planned(half.override(["strategy.options.teacher_quantization=nf4"]))[1]
        streamed = planned(half.override(["strategy.options.teacher_streamed=true"]))[1]
        small, dense, away = (Model(each) for each in (packed, replace(packed, teacher=streamed.teacher), streamed))
        assert small.bytes["teacher"] < dense.bytes["teacher"] and dense.host == 0
        assert away.host > 0, "in host memory"

    def test_one_that_no_plan_follows_is_said(self, half: FastpeftConfig) -> None:
        given = half.override(["strategy.options.teacher_quantization=int8", "memory.budget_gib=1"])
        message = r"memory\.budget_gib: expected strategy\.options\.teacher_quantization none, nf4 or fp4, got int8"
        with pytest.raises(UserError, match=message):
            check_run(given, Console(quiet=True))

    @pytest.mark.full
    def test_the_plan_of_a_run_names_it(self, half: FastpeftConfig) -> None:
        plan = check_run(half.override(["memory.budget_gib=4"]), Console(quiet=True)).prepared.memory.plan
        assert plan is not None and plan.bytes["teacher"] > 0 and "\nteacher " in str(plan)
