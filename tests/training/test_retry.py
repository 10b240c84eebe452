"""Trainers whose steps run out of memory: losses, metrics and adapter are those of a training in which none did."""

from __future__ import annotations

import copy
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

import fastpeft
from fastpeft.memory.exhaustion.out_of_memory import OutOfMemory
from fastpeft.memory.layers import model_layers
from fastpeft.strategies import base
from tests.checkpoints import Checkpoints, write_rows
from tests.integration.models import make
from tests.integration.test_trainers import Rows, arguments
from tests.memory.exhaustion.exhausted import SAID

from .runs import adapter, chats, texts, train

STEPS = shlex.split(
    "--max-steps 2 --learning-rate 1e-2 --logging-steps 1 --lora.r 4 --lora.dropout 0.2 --report-to none "
    "--batch-size 2 --gradient-accumulation-steps 2"
)


@contextmanager
def full_at(model: nn.Module, *calls: int) -> Iterator[list[int]]:
    """Memory that runs out in the backward pass of some of the model's calls with gradients, numbered from 1."""
    layer, made = next(iter(model_layers(model).values())), [0]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        made[0] += 1
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if made[0] in calls and hidden.requires_grad:
            hidden.register_hook(fail)

    def fail(_: Any) -> None:
        raise torch.OutOfMemoryError(SAID)

    hook = layer.register_forward_hook(after)
    yield made
    hook.remove()


@pytest.mark.full
@pytest.mark.parametrize(("accumulate", "times"), [(1, 2), (4, 3)])
def test_a_trainer_of_transformers(accumulate: int, times: int, tmp_path: Path) -> None:
    start, ends = make(lora_dropout=0.3), []
    for calls in ((), (3, 5, 8)):
        model = fastpeft.accelerate(copy.deepcopy(start))
        settings = arguments(tmp_path, gradient_accumulation_steps=accumulate, logging_steps=1)
        trainer = fastpeft.retry_steps(Trainer(model, settings, train_dataset=Rows(model)))
        with full_at(model, *calls) as made:
            trainer.train()
        losses = [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "loss" in log]
        ends.append((losses, [p for p in model.parameters() if p.requires_grad], made[0]))
    assert ends[0][0] == ends[1][0] != []
    assert all(torch.equal(one, other) for one, other in zip(ends[0][1], ends[1][1], strict=True))
    assert len([note for note in fastpeft.report(model).notes if "memory ran out" in note]) == times
    assert ends[1][2] > ends[0][2]


@pytest.mark.parametrize("kind", ["llama", pytest.param("bert", marks=pytest.mark.full)])
def test_fastpeft_train(kind: str, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", *(chats() if kind == "llama" else texts()))
    given = ["--model", checkpoints[kind], "--data", rows, *STEPS]
    wanted = train(tmp_path / "wanted", *given)
    original = base.load_model

    def failing(*args: Any) -> Any:
        model = original(*args)
        full_at(model, 3, 5).__enter__()
        return model

    monkeypatch.setattr(base, "load_model", failing)
    found = train(tmp_path / "found", *given, "--memory.retry", "true")
    assert found.record["losses"] == wanted.record["losses"]
    ours, theirs = adapter(found.folder), adapter(wanted.folder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (
        "memory ran out: a step was run again, with activations of layers:" in (found.folder / "report.md").read_text()
    )
    logs = [list(_logs(run.folder)) for run in (found, wanted)]
    assert logs[0] == logs[1] != []


def _logs(folder: Path) -> Iterator[dict[str, Any]]:
    """What the trainer logged, without times."""
    import json

    for state in sorted(folder.glob("checkpoint-*/trainer_state.json")):
        for log in json.loads(state.read_text())["log_history"]:
            yield {name: value for name, value in log.items() if "runtime" not in name and "second" not in name}


def test_without_retry_the_command_says_what_helps(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastpeft.memory.exhaustion.advice.prediction", lambda *_: (["predicted"], []))
    original = base.load_model

    def failing(*args: Any) -> Any:
        model = original(*args)
        full_at(model, 2).__enter__()
        return model

    monkeypatch.setattr(base, "load_model", failing)
    rows = write_rows(tmp_path / "rows.jsonl", *texts())
    train(tmp_path / "run", "--model", checkpoints["bert"], "--data", rows, *STEPS, code=1)
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith("fastpeft: out of GPU memory: CUDA out of memory. Less is needed with --method qlora")
    assert others[0].startswith("fastpeft: memory ran out in a training step of 2 rows of ")
    assert others[1:] == ["predicted", "what would need less, the cheapest first:"]


def settings(**changes: Any) -> Any:
    values = {"world_size": 1, "n_gpu": 1, "torch_compile": False, "optim": "sgd"} | changes
    return SimpleNamespace(**values)


@pytest.mark.parametrize(
    ("args", "kind", "reason"),
    [
        (settings(world_size=2), "NO", "2 processes train together, and the others would be past the step"),
        (settings(), "FSDP", "accelerate prepared the model for FSDP"),
        (settings(n_gpu=2), "NO", "the model is copied to several GPUs in each step (DataParallel)"),
        (settings(torch_compile=True), "NO", "the model is compiled, and other code may round otherwise"),
        (settings(activation_offloading=True), "NO", "activation_offloading of TRL keeps tensors of a failed step"),
    ],
)
def test_trainers_whose_steps_are_not_run_again(
    args: Any, kind: str, reason: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastpeft.memory.exhaustion.advice.prediction", lambda *_: ([], []))

    def step(model: Any, inputs: Any) -> None:
        raise torch.OutOfMemoryError(SAID)

    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value=kind))
    trainer = SimpleNamespace(training_step=step, model=make(), args=args, accelerator=accelerator)
    with caplog.at_level(logging.WARNING):
        fastpeft.retry_steps(trainer)
    assert reason in caplog.text
    with pytest.raises(OutOfMemory) as caught:
        trainer.training_step(trainer.model, {})
    assert f"not run again: {reason}" in str(caught.value)


def test_trainers_that_generate_and_what_is_no_trainer() -> None:
    class Generating(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return inputs

    trainer = object.__new__(Generating)
    trainer.args = settings()
    reason = fastpeft.integrations.trainer.why_not_retried(trainer)  # type: ignore[attr-defined]
    assert reason == "Generating makes what it trains on within a step"
    with pytest.raises(TypeError, match="trainer: expected a Trainer of transformers with a model, got str"):
        fastpeft.retry_steps("trainer")
