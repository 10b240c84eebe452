"""A model of transformers that another library's module holds, as a sentence encoder or Lightning's module does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import fastpeft
from fastpeft.integrations.models import is_around, is_model, model_within
from fastpeft.tuning import cases_of
from tests.integration.blocks import WIDTH, Stack
from tests.integration.models import batch, make, make_base, with_lora
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


def test_siblings_around_a_compiled_model() -> None:
    """The run that finds them is not compiled, nor are its hooks."""
    model, compiled = make().train(), []
    given = {name: value for name, value in batch(model).items() if name != "labels"}

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(torch.is_grad_enabled())
        return graph.forward

    around = fastpeft.accelerate(Around(torch.compile(copy.deepcopy(model), backend=backend)))  # type: ignore[arg-type]
    for _ in range(2):
        torch.testing.assert_close(around(given), model(**given).logits)
    assert siblings(around) and len(around.seen) == 2
    assert compiled and all(compiled)


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


def chosen(module: nn.Module) -> Any:
    return model_within(module, (LoraLayer,), "adapted layers", "pass a batch")


def test_which_model_it_is() -> None:
    model, plain = make(), Stack()
    assert chosen(model) is model and chosen(plain) is plain
    assert chosen(Around(model)) is model and chosen(nn.Sequential(Around(model), plain)) is model
    assert is_model(model.base_model) and is_model(model.get_base_model()) and not is_model(plain)


def test_a_compiled_model_is_one() -> None:
    model = make()
    compiled: Any = torch.compile(model)
    assert is_model(compiled) and not is_model(torch.compile(Stack()))  # type: ignore[arg-type]
    assert chosen(Around(compiled)) is compiled
    assert is_around(Around(compiled)) and not is_around(compiled) and not is_around(Stack())


def test_of_several_the_one_with_the_layers_and_none_within_another() -> None:
    model, bare = make(), make_base("bert")
    for pair in ([model, bare], [bare, model]):
        assert chosen(nn.ModuleList(pair)) is model
    for part in (model.get_base_model(), model.get_base_model().model):
        holder = nn.ModuleDict({"part": part, "whole": Around(model)})
        assert chosen(holder) is model


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


class TestNoOneModel:
    """What a made-up batch would leave out is not passed over."""

    @pytest.mark.parametrize("ask", [fastpeft.verify, fastpeft.tune, fastpeft.fp8_report])
    def test_layers_outside(self, ask: Any) -> None:
        outside = with_lora(Stack(1), None, target_modules=["q", "k", "v"]).base_model.model
        around = fastpeft.accelerate(nn.ModuleDict({"model": make(), "outside": outside}))
        wanted = "holds 1 model with such layers, model, and 3 outside, such as outside.blocks.0.q; pass a batch"
        with pytest.raises(ValueError, match=wanted):
            ask(around)

    @pytest.mark.parametrize("ask", [fastpeft.verify, fastpeft.tune, fastpeft.fp8_report])
    def test_several_models(self, ask: Any) -> None:
        two = fastpeft.accelerate(nn.ModuleDict({"policy": make(), "reference": make("bert")}))
        wanted = "got ModuleDict that holds 2 models with such layers, policy, reference; pass a batch"
        with pytest.raises(ValueError, match=wanted):
            ask(two)

    def test_a_plan_of_several(self) -> None:
        with pytest.raises(
            ValueError, match=r"expected all layers with adapters in one model.*policy, reference; pass one"
        ):
            fastpeft.plan(nn.ModuleDict({"policy": make(), "reference": make()}), gpu_memory="1GiB", seq=16)

    def test_norms_of_another_model_are_not_passed_over_by_verify(self) -> None:
        two = fastpeft.accelerate(nn.ModuleDict({"policy": make(), "reference": make_base()}))
        with pytest.raises(ValueError, match="2 models with such layers, policy, reference"):
            fastpeft.verify(two)

    def test_a_batch_reaches_layers_outside(self) -> None:
        class Both(Around):
            def __init__(self) -> None:
                super().__init__(make())
                self.outside = with_lora(Stack(1), None, target_modules=["q", "k", "v"]).base_model.model

            def forward(self, features: dict[str, Tensor]) -> Tensor:
                return self.outside(super().forward(features)[..., :WIDTH])

        around = fastpeft.accelerate(Both())
        found = fastpeft.verify(around, {"features": batch(around.model)})
        assert found.passed and {"outside.blocks.0.q"} <= {check.path for check in found.checks}


def test_paths_of_the_fp8_report_are_those_of_the_module_around() -> None:
    around = fastpeft.accelerate(Around(make()))
    above = fastpeft.fp8_report(around, limit=0.0).above
    assert above and set(above) <= {path for path, _ in around.named_modules()}
