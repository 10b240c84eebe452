"""`fastpeft train` of weights that the host's memory has no room for: they stay in the files of the cache."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpeft.config import FastpeftConfig
from fastpeft.memory.plan.planning import Plan
from fastpeft.memory.plan.predicting import Model
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy
from fastpeft.memory.streaming.host_store import is_mapped
from fastpeft.memory.streaming.layer import StreamedLayer
from fastpeft.training import memory as training_memory
from fastpeft.training.memory import Decision, decide, fixed
from tests.checkpoints import Checkpoints, write_rows

from .runs import Run, adapter, chats, train

STREAMED = MemoryPolicy((LayerPolicy("recompute", streamed=True),) * 2)
RUN = shlex.split("--method qlora --max-steps 2 --lora.r 4 --report-to none --batch-size 2 --streamed")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of these models are small."""
    monkeypatch.setattr("fastpeft.memory.streaming.stowing.SMALLEST", 16)
    monkeypatch.setattr("fastpeft.memory.plan.predicting.SMALLEST", 16)


def mapped(run: Run) -> list[bool]:
    layers = [module for module in run.model.modules() if isinstance(module, StreamedLayer)]
    return [is_mapped(stowed.host) for layer in layers for stowed in layer.fastpeft_bundle.stowed]


def test_the_same_run_from_the_disk(checkpoints: Checkpoints, tmp_path: Path) -> None:
    given = ["--model", checkpoints["llama"], "--data", write_rows(tmp_path / "rows.jsonl", *chats()), *RUN]
    found = train(tmp_path / "mapped", *given, "--memory.host-gib", "1e-9")
    wanted = train(tmp_path / "plain", *given)
    assert any(mapped(found)) and mapped(wanted) and not any(mapped(wanted))
    assert all(torch.equal(value, adapter(wanted.folder)[name]) for name, value in adapter(found.folder).items())


def config(checkpoints: Checkpoints, **memory: Any) -> FastpeftConfig:
    model = {"name": checkpoints["llama"], "task": "causal-lm", "quantization": "nf4"}
    return FastpeftConfig.from_dict({"method": "qlora", "model": model, "data": {"max_length": 64}, "memory": memory})


def decided(given: FastpeftConfig, device: str = "cuda") -> Decision:
    return decide(given, torch.device(device), torch.bfloat16, longest=64, processes=1)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Host memory that was planned for, by layers that need 100 bytes; a GPU with 8 GiB free, and 50 on the host."""
    asked: list[int | None] = []

    def answer(name: str, model: Model, capacity: int, host: int | None, policy: Any, *_: Any) -> Plan:
        from fastpeft.memory.plan.choosing import Need

        asked.append(host)
        waiting = max(0, 100 - host) if host is not None and any(model.mapped) else 0
        chosen = MemoryPolicy(STREAMED.layers, host_memory=100 - waiting if waiting else None)
        need = Need(chosen, 0, 0, "loss", 0, 0, 0, 3 << 30, 100 - waiting, 1.0, disk=waiting)
        fits = host is None or need.host <= host
        least = None if fits else need.host
        return Plan("m", fits, capacity, host, {}, {}, need, None, None, (), (), (), least_host=least)

    monkeypatch.setattr("fastpeft.memory.plan.planning.plan_on", answer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 16 << 30))
    monkeypatch.setattr("fastpeft.doctor.host.available_ram", lambda: (80, 50))
    return asked


def test_what_is_available_is_planned_for(checkpoints: Checkpoints, planned: list[int | None]) -> None:
    """On a GPU, where it is not enough; a machine without one is not the one that trains."""
    found = decided(config(checkpoints))
    assert planned == [None, 50] and found.waits and found.policy == MemoryPolicy(STREAMED.layers, host_memory=50)
    assert "of weights on the disk; 3.00 GiB predicted" in found.summary and not found.note
    found = decided(config(checkpoints, budget_gib=4), "cpu")
    assert planned[2:] == [None] and found.streams and not found.waits


def test_what_is_given_is_planned_for(checkpoints: Checkpoints, planned: list[int | None]) -> None:
    found = decided(config(checkpoints, budget_gib=4, host_gib=30 / 2**30), "cpu")
    assert planned == [30] and found.waits and found.policy.host_memory == 30  # type: ignore[union-attr]
    assert fixed(config(checkpoints, streamed=True, host_gib=1).memory) == MemoryPolicy(LayerPolicy(streamed=True))


def test_processes_share_what_the_host_has(checkpoints: Checkpoints, planned: list[int | None]) -> None:
    given = config(checkpoints, host_gib=80 / 2**30)
    decide(given, torch.device("cuda"), torch.bfloat16, longest=64, processes=8, local=4)
    decide(config(checkpoints), torch.device("cuda"), torch.bfloat16, longest=64, processes=2)
    assert planned == [20, 20, None, 25, None], "streams of several are planned anew, as offloaded"


def test_how_many_processes_are_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert training_memory.local_processes(6) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert training_memory.local_processes(8) == 4 and training_memory.local_processes(1) == 1


def test_what_keys_say_is_held_to_the_hosts_memory(checkpoints: Checkpoints) -> None:
    """Inputs come first, and weights have what is left; only 4-bit ones wait."""
    inputs = 2 * 4 * 64 * 64 * 2
    given = config(checkpoints, activations="offload", streamed=True, host_gib=(inputs + 1000) / 2**30)
    given = given.override(["training.per_device_train_batch_size=4"])
    found = decided(given, "cpu")
    assert found.policy == replace(fixed(given.memory), host_memory=1000) and found.waits and found.plan is None  # type: ignore[type-var]
    found = decided(given.override(["memory.host_gib=1"]), "cpu")
    assert found.policy == fixed(given.memory) and found.streams and not found.waits
    budget = decided(given.override(["memory.budget_gib=4", "memory.host_gib=1"]), "cpu")
    assert budget.plan is not None and budget.streams and not budget.waits
    message = r"^memory\.host_gib: expected at least 0\.01 GiB, which are"
    for less in (["memory.streamed=false"], ["method=lora", "model.quantization=none"]):
        with pytest.raises(training_memory.UserError, match=message):
            decided(given.override([*less, "memory.host_gib=1e-8"]), "cpu")


@pytest.mark.parametrize("key", ["gradient_checkpointing true", "activations recompute"])
def test_a_size_that_nothing_takes(key: str, checkpoints: Checkpoints) -> None:
    given = config(checkpoints, host_gib=1).override([f"memory.{key.replace(' ', '=')}"])
    with pytest.raises(
        training_memory.UserError, match=rf"^memory\.host_gib: expected null with memory\.{key}, got 1$"
    ):
        training_memory.check_memory(given)
    training_memory.check_memory(given.override(["memory.budget_gib=4"]))


def test_what_is_not_in_files_does_not_wait(
    checkpoints: Checkpoints, planned: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(checkpoints).override(["model.packed_cache=false"])
    found = decided(given)
    assert not found.waits
    assert found.note == "this run may not fit into the host's memory: 0.00 GiB are predicted, of 0.00 GiB"
    with pytest.raises(training_memory.UserError, match=r"^memory\.host_gib: expected at least 0\.01 GiB, which are"):
        decided(given.override(["memory.budget_gib=4", f"memory.host_gib={30 / 2**30}"]))
