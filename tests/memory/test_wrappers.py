"""Policies under what wraps or transforms a whole model: FSDP2, DistributedDataParallel, torch.compile, a Trainer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import LayerPolicy, MemoryPolicy
from fastpeft.memory.layers import model_layers
from tests.integration.steps import Step
from tests.memory.test_policies import seeded, started

pytestmark = pytest.mark.full
MIXED = MemoryPolicy((LayerPolicy("offload"), LayerPolicy("recompute")))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def local(found: Step) -> Step:
    """Of FSDP2's gradients what is here."""
    names = {name: getattr(g, "to_local", lambda g=g: g)() for name, g in found.gradients.items()}
    return Step(found.loss, names)


@pytest.mark.parametrize("policy", [LayerPolicy("recompute"), LayerPolicy("offload"), MIXED])
@pytest.mark.usefixtures("one_process")
def test_fully_sharded(policy: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model, given, wanted = started()
    fastpeft.accelerate(model, memory=policy)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model_layers(model).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        assert local(seeded(model, given)).equals(wanted)
    fastpeft.restore(model)
    assert not any(layer.gradient_checkpointing for layer in model_layers(model).values())


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel() -> None:
    model, given, wanted = started()
    wrapped = nn.parallel.DistributedDataParallel(model)
    fastpeft.accelerate(wrapped, memory=MIXED)
    for _ in range(2):
        got = seeded(wrapped, given)
        assert Step(got.loss, {n.removeprefix("module."): g for n, g in got.gradients.items()}).equals(wanted)


def test_compiled() -> None:
    """The compiler's own rounding differs from ours, with policies or without; offloading is recomputation there."""
    model, given, _ = started(lora_dropout=0.0)
    found = []
    for memory in (None, MIXED):
        torch._dynamo.reset()
        compiled = torch.compile(fastpeft.accelerate(copy.deepcopy(model), memory=memory), backend="aot_eager")
        found.append(seeded(compiled, given))
    plain, got = found
    torch.testing.assert_close(got.loss, plain.loss)
    torch.testing.assert_close(got.gradients, plain.gradients)


def test_a_trainer_with_checkpointing(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model, given, _ = started(lora_dropout=0.0)
    rows = [{name: value[0] for name, value in given.items()}] * 4
    finals = []
    for memory, checkpointing in ((None, False), (MIXED, True)):
        one = fastpeft.accelerate(copy.deepcopy(model), memory=memory)
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=2, report_to=[],
            gradient_checkpointing=checkpointing, use_cpu=True, save_strategy="no", seed=1, disable_tqdm=True,
        )  # fmt: skip
        Trainer(one, arguments, train_dataset=rows).train()  # type: ignore[arg-type]
        finals.append({n: p.detach() for n, p in one.named_parameters() if p.requires_grad})
    assert finals[0].keys() == finals[1].keys() and all(torch.equal(p, finals[1][n]) for n, p in finals[0].items())
