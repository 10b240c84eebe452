"""`fastpeft.tune` on a model: it finds what the model computes, and leaves the model alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import fastpeft
from fastpeft.tuning import cases_of
from fastpeft_kernels.tuning import choosing
from tests.checkpoints import Checkpoints


@pytest.fixture
def model(checkpoints: Checkpoints) -> nn.Module:
    base = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False)
    return fastpeft.accelerate(get_peft_model(base, config)).eval()


def test_the_groups_of_a_model_are_found(model: nn.Module) -> None:
    cases = [(tunable.op, key) for tunable, key in cases_of(model, [48])]
    assert Counter(op for op, _ in cases) == {"gated_activation": 1, "gated_activation_backward": 1}
    assert {key.tokens for _, key in cases} == {64}


def test_on_a_gpu_the_products_of_groups_and_mlps_are_found(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All projections' large products, in both directions, and those of rank width; the CPU stands for the GPU."""
    monkeypatch.setattr("fastpeft_kernels.lora.keys.kernels_serve", lambda device: True)
    monkeypatch.setattr("fastpeft_kernels.common.device._slow_on_cpu", lambda dtype: False)
    base = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.bfloat16)
    config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    model = fastpeft.accelerate(get_peft_model(base, config))
    with torch.autocast("cpu", torch.bfloat16):
        cases = [(tunable.op, key) for tunable, key in cases_of(model, [48])]
    sizes = ((64, 64), (64, 128), (128, 64))  # q, k, v and o; gate and up; down
    large = {(64, n, m, "bfloat16", False) for n, m in sizes} | {(64, m, n, "bfloat16", True) for n, m in sizes}
    assert {key for op, key in cases if op == "lora_linear"} == large
    narrow = {(64, 16), (64, 64), (64, 32), (128, 16)}  # one projection's; S of q, k and v, of gate and up; down's
    assert {(key.features, key.rank) for op, key in cases if op == "lora_rank_products"} == narrow
    assert {key for op, key in cases if op == "lora_mlp_activation"} == {(64, 128, "silu", True, "bfloat16")}


def test_the_model_stays_as_it_was_and_nothing_is_measured_twice(model: nn.Module, measured_choices: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = fastpeft.tune(model, tokens=[16])
    assert found.file.parent == measured_choices and found.file.exists()
    assert torch.equal(random, torch.get_rng_state()) and not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(row.note for row in fastpeft.report(model).rows if row.kind not in ("norms", "loss"))  # few numbers
    assert fastpeft.verify(model).passed
    shown = str(found).splitlines()
    assert shown[0].split() == ["op", "case", "fastest", "us", "library", "us"]
    assert shown[-2].endswith(", 0 of them measured earlier") and shown[-1] == f"kept in {found.file}"
    again = fastpeft.tune(model, tokens=[16])
    assert [o.winner for o in again.outcomes] == [o.winner for o in found.outcomes]
    assert all(o.reused for o in again.outcomes)


def test_whatever_wins_the_model_computes_the_same(model: nn.Module) -> None:
    for backend in ("torch", "native"):
        with choosing.forced({"gated_activation": backend, "gated_activation_backward": backend}):
            assert fastpeft.verify(model).passed


def test_layers_on_several_devices(model: nn.Module) -> None:
    model.get_submodule("base_model.model.model.layers.1").to("meta")
    with pytest.raises(ValueError, match="model: expected accelerated layers on one device, got cpu, meta"):
        fastpeft.tune(model, tokens=[16])


def test_wrong_arguments(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"tokens: expected one or more numbers from 1 on, got \[8, 0\]"):
        fastpeft.tune(model, tokens=[8, 0])
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        fastpeft.tune("llama")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no accelerated layer in it"):
        fastpeft.tune(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected parameters that require gradients"):
        fastpeft.tune(model.requires_grad_(False))
