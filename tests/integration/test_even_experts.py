"""Llama 4's stacked experts, which take as many rows each: recognised, computed by the op, equal to PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastpeft
from fastpeft.bench.matrix.families import FAMILIES, batch
from fastpeft.layers.experts import FastExperts
from tests.budget import assert_within_budget
from tests.integration.models import trained
from tests.integration.steps import assert_step_close, step, truth

STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def make(dtype: torch.dtype = torch.float32) -> Any:
    base = FAMILIES["llama4"].build().to(dtype)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() == 3:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["o_proj"], target_parameters=STACKS)
    return trained(get_peft_model(base, config)).train()


def outermost(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, FastExperts))


def notes(model: nn.Module) -> set[str]:
    return {row.note for row in fastpeft.report(model).rows if row.op == "lora_experts"}


@pytest.mark.parametrize("checkpointed", (False, True))
def test_whole_models(checkpointed: bool) -> None:
    model = make()
    given = batch(model.get_base_model())
    theirs, exact = step(model, given), truth(model, given)
    if checkpointed:
        model.get_base_model().gradient_checkpointing_enable()
        model.enable_input_require_grads()
    fastpeft.accelerate(model)
    assert_step_close(step(model, given), theirs, exact)
    assert notes(model) == {""}
    if not checkpointed:
        assert fastpeft.verify(model).passed
        assert step(fastpeft.restore(model), given).equals(theirs)


@pytest.mark.parametrize(("dtype", "autocast"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_one_layer(dtype: str, autocast: bool) -> None:
    model = fastpeft.accelerate(make(getattr(torch, dtype)))
    layer = outermost(model)
    plain = outermost(copy.deepcopy(model))
    plain.fastpeft_suspended = True
    wide = copy.deepcopy(plain).double()
    x = torch.randn(4 * 5, 64).to(getattr(torch, dtype))

    def derived(layer: Any, x: Tensor, dy: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        trained = [p for p in layer.parameters() if p.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, [leaf, *trained], dy.to(y.dtype))]

    dy = torch.randn(20, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours, theirs = derived(layer, x, dy), derived(plain, x, dy)
    for mine, peft, exact in zip(ours, theirs, derived(wide, x.double(), dy.double()), strict=True):
        assert_within_budget(mine, peft, exact)


def test_calls_that_are_left_to_peft() -> None:
    layer = outermost(fastpeft.accelerate(make()))
    x = torch.randn(8, 64)
    torch.testing.assert_close(layer(x.view(2, 4, 64)), layer(x))
    assert layer.fastpeft_calls == {"fused": 1, "an input of (2, 4, 64) for 4 experts": 1}
    with pytest.raises(TypeError):  # PEFT's own answer
        layer(x, x)
    assert layer.fastpeft_calls["called otherwise than with x"] == 1
