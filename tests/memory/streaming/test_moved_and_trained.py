"""Streamed layers in the hands of those who move models and train them: model.to, a Trainer, accelerate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer

from tests.integration.test_trainers import Rows, arguments
from tests.memory.streaming.test_streaming import _small, on_device, ring_of, started, streamed  # noqa: F401

STEPS = 2


def check_streamed(model: nn.Module) -> None:
    """No more has been on the device than the places of the ring hold, and most of the base has no memory now."""
    ring = ring_of(model)
    assert len(ring.filled) <= 2 and ring.peak == sum(sorted(bundle.nbytes for bundle in ring.bundles)[-2:])
    ring.empty()
    assert not any(stowed.tensor.untyped_storage().nbytes() for bundle in ring.bundles for stowed in bundle.stowed)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def train(
    model: nn.Module, given: dict[str, Any], optimizer: Any, backward: Callable[[Tensor], None] = Tensor.backward
) -> list[float]:
    """Losses; what is dropped is the same at each call."""
    torch.manual_seed(5)
    losses = []
    for _ in range(STEPS):
        loss = model(**given).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def pair(**config: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A resident model, one of the same values that is streamed, and a batch."""
    resident, given, _ = started(**config)
    moved = copy.deepcopy(resident)
    streamed(moved, "recompute")
    return resident, moved, given


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)


@pytest.mark.parametrize("four_bits", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_model_that_is_moved_trains_on(four_bits: bool) -> None:
    resident, moved, given = pair(**({"double_quant": True} if four_bits else {}))
    small = on_device(moved)
    assert moved.to("cpu") is moved and on_device(moved) == small
    before = trained(resident)
    assert train(moved, given, adamw(moved)) == train(resident, given, adamw(resident))
    assert same(trained(moved), trained(resident)) and not same(trained(moved), before)
    check_streamed(moved.to(torch.device("cpu")))


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_trainer(checkpointing: bool, tmp_path: Path) -> None:
    resident, moved, _ = pair(lora={"lora_dropout": 0.0})
    before = trained(resident)
    for model in (resident, moved):
        options = {"max_steps": STEPS, "gradient_checkpointing": checkpointing}
        trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=Rows(model))
        trainer.train()
    assert same(trained(moved), trained(resident)) and not same(trained(moved), before)
    check_streamed(moved)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


def test_a_model_that_accelerate_prepared() -> None:
    """Wrapped or not, its layers are streamed, and it trains on with the optimizer that was prepared with it."""
    resident, moved, given = pair()
    accelerator, before = Accelerator(cpu=True), trained(resident)
    model, optimizer = accelerator.prepare(moved, adamw(moved))
    assert accelerator.unwrap_model(model) is moved
    assert train(model, given, optimizer, accelerator.backward) == train(resident, given, adamw(resident))
    assert same(trained(moved), trained(resident)) and not same(trained(moved), before)
    check_streamed(moved)
