"""`fastpeft.plan` of a loaded model, and `accelerate(memory=plan)`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

import fastpeft
from fastpeft import LayerPolicy, MemoryPolicy
from fastpeft.memory.plan.loaded import model_of_loaded
from fastpeft.memory.trace.skeleton import stored
from tests.integration.models import batch, make, make_base, with_lora
from tests.integration.quantised import make_quantised
from tests.integration.steps import step
from tests.memory.test_policies import seeded

SIZES = {"num_hidden_layers": 4}
CAPACITY = 2 << 30


def llama(**config: Any) -> Any:
    return with_lora(make_base("llama", torch.bfloat16, **SIZES), **config).train()


def test_what_the_model_says_is_taken_from_it() -> None:
    model = llama(r=3, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], layers_to_transform=[1, 3])
    name, found = model_of_loaded(model, 32, 2, "adamw_torch")
    setting = found.setting
    assert (name, setting.task, setting.dtype, setting.packed) == ("llama", "causal-lm", torch.bfloat16, False)
    assert (setting.section.r, setting.section.target_modules) == (3, ["down_proj", "q_proj"])
    assert setting.section.modules_to_save == ["lm_head"] and setting.section.extra["layers_to_transform"] == [1, 3]
    real: dict[str, int] = {}
    for kind, tensor in stored(model):
        real[kind] = real.get(kind, 0) + tensor.nbytes
    for kind, size in real.items():
        assert size <= found.bytes[kind] <= size + 512 * 80


@pytest.mark.full
@pytest.mark.parametrize("nested", [True, False])
def test_four_bits_are_counted_with_their_scales(nested: bool) -> None:
    model = make_quantised(double_quant=nested)
    found = model_of_loaded(model, 32, 2, "adamw_torch")[1]
    real = sum(tensor.nbytes for kind, tensor in stored(model) if kind == "packed")
    assert found.setting.packed and real <= found.bytes["packed"] <= real + 512 * 100


def test_a_plan_is_carried_out(caplog: pytest.LogCaptureFixture) -> None:
    model = fastpeft.accelerate(make(lora_dropout=0.3))
    given = batch(model)
    step(model, given)
    wanted = seeded(model, given)
    policy = MemoryPolicy((LayerPolicy("recompute"), LayerPolicy("recompute", streamed=True)))
    plan = fastpeft.plan(model, gpu_memory=CAPACITY, seq=16, policy=policy, largest=False)
    resident = model_of_loaded(model, 16, 1, "adamw_torch")[1].bytes
    assert seeded(fastpeft.accelerate(model, memory=plan), given).equals(wanted)
    assert not [record for record in caplog.records if record.name == "fastpeft"], "transformers may warn of caches"
    rows = [row.op for row in fastpeft.report(model).rows if row.kind == "memory"]
    assert rows == ["recompute", "recompute, streamed"]
    assert model_of_loaded(model, 16, 1, "adamw_torch")[1].bytes == resident  # wherever weights are
    fastpeft.accelerate(model, memory=replace(plan, fits=False, gpu_memory=64 << 20))
    assert "the plan does not fit: 0." in caplog.text and "on a GPU of 0.06 GiB" in caplog.text
    with pytest.raises(ValueError, match="memory: expected a plan for 4 layers, got one for 2, of llama"):
        fastpeft.accelerate(llama(), memory=plan)


@pytest.mark.parametrize(
    ("make_model", "options", "said"),
    [
        (make_base, {}, "model: expected a model of transformers with one adapter, got LlamaForCausalLM with 0"),
        (make, {"rank": 8}, "rank: expected to be left out, a loaded model has its own"),
        (make, {"seq": 0}, "seq: expected 1 to"),
        (make, {"optimizer": "adam"}, "optimizer: expected one of"),
    ],
)
def test_what_cannot_be_planned(make_model: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fastpeft.plan(make_model(), **({"gpu_memory": CAPACITY, "seq": 16} | options))


@pytest.mark.full
@pytest.mark.parametrize("name", ["t5", "bert", "gpt2", "bart", "qwen3", "gemma2", "phi3"])
def test_other_families(name: str) -> None:
    assert fastpeft.plan(make(name), gpu_memory=CAPACITY, seq=16, largest=False).fits


def test_a_classifier_whose_head_peft_finds_and_random_numbers() -> None:
    base = AutoModelForSequenceClassification.from_config(make_base("llama").config)
    adapter = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], lora_dropout=0.1)
    model, random = get_peft_model(base, adapter), torch.get_rng_state()
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    plan = fastpeft.plan(model, gpu_memory="1GiB", seq=8, policy=MemoryPolicy(), largest=False)
    assert plan.settings["task"] == "sequence-classification" and torch.equal(random, torch.get_rng_state())
