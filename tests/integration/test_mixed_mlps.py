"""MLPs in batches in which each row has an adapter of its own: one op, PEFT's numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import fastpeft
from fastpeft.layers.mlp import FastMlp
from tests.integration.blocks import assert_same
from tests.integration.models import batch, checkpointed, make

NAMES = ["b", "__base__", "default", "b"]
OF_THE_SECOND = {"llama": ["q_proj", "up_proj", "down_proj"], "gpt2": ["c_fc"]}


def several(name: str) -> tuple[Any, Any]:
    """(accelerated, plain) with two adapters, of which the second adapts a part of the MLPs."""
    peft = make(name, target_modules="all-linear")
    peft.add_adapter("b", LoraConfig(target_modules=OF_THE_SECOND[name], r=3, lora_alpha=7, init_lora_weights=False))
    peft.base_model.set_adapter(["default", "b"])
    return fastpeft.accelerate(copy.deepcopy(peft)), peft


def step(model: Any, given: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Logits and gradients of a mixed batch."""
    model.zero_grad(set_to_none=True)
    with fastpeft.mixed_batch(model, names):
        logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits
        logits.square().mean().backward()
    return {"y": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def calls(model: Any) -> set[str]:
    mlps = [module for module in model.modules() if isinstance(module, FastMlp)]
    assert len(mlps) == 2
    return {outcome for mlp in mlps for outcome in mlp.__dict__["fastpeft_calls"]}


@pytest.mark.parametrize("name", OF_THE_SECOND)
def test_gradients_are_peft_s(name: str) -> None:
    ours, peft = several(name)
    given = batch(peft, rows=4)
    exact = copy.deepcopy(peft).double()
    for names in (NAMES, ["b"] * 4):
        found, expected = step(ours, given, names), step(exact, given, names)
        assert any("mlp" in parameter and ".b." in parameter for parameter in found)
        assert_same(found, expected)
    assert calls(ours) == {"fused"}


def test_peft_s_own_way_of_naming_adapters() -> None:
    """`model(..., adapter_names=...)`, for inference."""
    ours, peft = (model.eval() for model in several("llama"))
    given = batch(peft, rows=4)
    del given["labels"]
    torch.testing.assert_close(
        ours(**given, adapter_names=NAMES).logits, peft(**given, adapter_names=NAMES).logits, rtol=1e-4, atol=1e-4
    )
    assert calls(ours) == {"fused"}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed(use_reentrant: bool) -> None:
    ours, _ = several("llama")
    given = batch(ours, rows=4)
    plain = step(ours, given, NAMES)
    assert_same(step(checkpointed(ours, use_reentrant), given, NAMES), plain)


def test_what_is_not_of_a_mixed_batch_runs_part_by_part() -> None:
    ours, _ = several("llama")
    given = batch(ours, rows=4)
    mlp: Any = next(module for module in ours.modules() if isinstance(module, FastMlp))
    mlp.up_proj.register_forward_pre_hook(lambda module, args: None)
    step(ours, given, NAMES)
    assert calls(ours) == {"fused", "up_proj: a hook on a bypassed FastLinear"}
    mlp.up_proj._forward_pre_hooks.clear()
    with fastpeft.mixed_batch(ours, NAMES):
        mlp.up_proj._forward_pre_hooks.clear()
        mlp(torch.randn(4, 3, 64))
    assert "a mixed batch with other names for some projections" in calls(ours)
