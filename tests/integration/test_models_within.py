"""A model of transformers that another library's module holds, as a sentence encoder or Lightning's module does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import fastpeft
from fastpeft.integrations.models import is_model, model_within
from fastpeft.tuning import cases_of
from tests.integration.blocks import Stack
from tests.integration.models import batch, make, make_base
from tests.integration.reports import notes, siblings


class Around(nn.Module):
    """Keeps what each forward gave, as losses that look at it afterwards do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(**features).logits
        self.seen.append(logits)
        return logits


def adapted(architecture: str, wrapped_by_peft: bool) -> Any:
    if wrapped_by_peft:
        return make(architecture)
    model = make_base(architecture)
    model.add_adapter(LoraConfig(r=4, target_modules="all-linear"))
    return model


@pytest.mark.parametrize("wrapped_by_peft", [False, True])
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_siblings_are_found_and_the_module_around_runs_once(architecture: str, wrapped_by_peft: bool) -> None:
    model = adapted(architecture, wrapped_by_peft).train()
    given = {name: value for name, value in batch(model).items() if name != "labels"}
    around = Around(fastpeft.accelerate(copy.deepcopy(model)))
    fastpeft.accelerate(around)
    torch.testing.assert_close(around(given), model(**given).logits)
    assert len(around.seen) == 1
    assert siblings(around) and not notes(around)


def test_which_model_it_is() -> None:
    model, plain = make(), Stack()
    assert model_within(model) is model and model_within(plain) is plain
    assert model_within(Around(model)) is model and model_within(nn.Sequential(Around(model), plain)) is model
    two = nn.ModuleList([Around(model), make_base("bert")])
    assert model_within(two) is two
    assert is_model(model.base_model) and is_model(model.get_base_model()) and not is_model(plain)


@pytest.mark.parametrize("wrapped_by_peft", [False, True])
def test_verify_tune_and_plan_take_the_module_around(wrapped_by_peft: bool) -> None:
    around = Around(adapted("llama", wrapped_by_peft))
    fastpeft.accelerate(around)
    found = fastpeft.verify(around)
    assert found.passed and len(found.checks) == len(fastpeft.verify(around.model).checks)
    assert cases_of(around, [64]) == cases_of(around.model, [64])
    plans = [fastpeft.plan(each, gpu_memory="1GiB", seq=16, largest=False) for each in (around, around.model)]
    assert str(plans[0]) == str(plans[1])
    assert not around.seen
