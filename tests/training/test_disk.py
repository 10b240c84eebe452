"""`fastpeft train` of weights that the host's memory has no room for: they stay in the files of the cache."""

from __future__ import annotations

import shlex
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
        return Plan("m", fits, capacity, host, {}, {}, need, None, None, (), (), ())

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
    assert fixed(config(checkpoints, streamed=True, host_gib=1).memory) == MemoryPolicy(
        LayerPolicy(streamed=True), host_memory=1 << 30
    )
    assert decided(config(checkpoints, streamed=True, host_gib=1), "cpu").waits


def test_what_is_not_in_files_does_not_wait(
    checkpoints: Checkpoints, planned: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(checkpoints).override(["model.packed_cache=false"])
    found = decided(given)
    assert not found.waits
    assert found.note == "this run may not fit into the host's memory: 0.00 GiB are predicted, of 0.00 GiB"
    with pytest.raises(training_memory.UserError, match=r"^memory\.host_gib: expected at least 0\.00 GiB, which are"):
        decided(given.override(["memory.budget_gib=4", f"memory.host_gib={30 / 2**30}"]))
