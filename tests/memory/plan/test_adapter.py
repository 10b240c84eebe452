"""Plans for an adapter's whole configuration."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import fastpeft
from fastpeft.errors import UserError
from fastpeft.memory.plan.adapter import read_adapter, section_of
from fastpeft.memory.plan.predicting import Model, Setting
from fastpeft.memory.policy import LayerPolicy
from tests.commands import run

from .seeing import measured

WITHIN = 0.05
CONFIG = LlamaConfig(
    vocab_size=2000, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
SOME = ["q_proj", "v_proj", "down_proj"]
ADAPTERS: dict[str, LoraConfig] = {
    "dora": LoraConfig(r=8, target_modules=SOME, use_dora=True),
    "head trained whole": LoraConfig(r=8, target_modules=SOME, modules_to_save=["lm_head"]),
    "tokens": LoraConfig(r=8, target_modules=SOME, trainable_token_indices=[1, 2, 3]),
    "ranks": LoraConfig(r=8, target_modules=SOME, rank_pattern={"q_proj": 32}, layers_to_transform=[0, 2, 5]),
    "biases, dropout": LoraConfig(r=8, target_modules="all-linear", bias="all", lora_dropout=0.1),
}
HELD_OUT = {"dora and head": LoraConfig(r=4, target_modules="all-linear", use_dora=True, modules_to_save=["lm_head"])}
"""Looked at only when all else was finished."""
OPTIONS: dict[str, Any] = {"gpu_memory": "2GiB", "seq": 64, "method": "lora", "largest": False}


def ratio(adapter: LoraConfig, policy: LayerPolicy) -> float:
    """Of the predicted peak of a step to the measured; what is trained is exact."""
    section = section_of(adapter, task="causal-lm")
    told = Model(
        Setting(CONFIG, "causal-lm", 160, 2, False, torch.float32, section, device="cpu", accumulated=False), whole=True
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    model: Any = get_peft_model(base, copy.deepcopy(adapter)).train()
    assert told.bytes["trained"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    ids = torch.randint(4, 2000, (2, 160))
    return told.peak((policy,) * 6, 2, 160).size / measured(model, {"input_ids": ids, "labels": ids}, policy)


def test_peak_of_dora() -> None:
    assert abs(ratio(ADAPTERS["dora"], LayerPolicy("recompute")) - 1) <= WITHIN


@pytest.mark.full
@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("name", [*ADAPTERS, *HELD_OUT])
def test_every_peak(name: str, policy: Any) -> None:
    assert abs(ratio((ADAPTERS | HELD_OUT)[name], LayerPolicy(policy)) - 1) <= WITHIN


def test_a_file_of_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the same configuration in Python; in place of rank and targets."""
    base, there, adapter = tmp_path / "base", tmp_path / "adapter", ADAPTERS["head trained whole"]
    CONFIG.save_pretrained(base)
    adapter.save_pretrained(there)
    plan = fastpeft.plan(CONFIG, adapter=adapter, **OPTIONS)
    assert plan.settings["rank"] == 8 and plan.bytes["adapters"] > 2 * 2000 * 256
    words = ["plan", str(base), "--gpu-memory", "2GiB", "--seq", "64", "--method", "lora", "--no-largest", "--json"]
    for given in (there, there / "adapter_config.json"):
        answer = run(capsys, *words, "--adapter", str(given))
        assert json.loads(answer.out)["plans"][0]["bytes"] == plan.bytes
    wrong = run(capsys, *words, "--adapter", str(there), "--rank", "4")
    assert wrong.code == 2 and "rank: expected to be left out, the adapter has its own" in wrong.err


@pytest.mark.full
def test_a_classifier_whose_head_peft_names() -> None:
    given = LoraConfig(task_type="SEQ_CLS", target_modules=SOME, modules_to_save=["classifier", "score"])
    assert section_of(given, task="sequence-classification").modules_to_save == []
    assert fastpeft.plan(CONFIG, adapter=given, task="sequence-classification", **OPTIONS).fits


@pytest.mark.full
@pytest.mark.parametrize(
    "options", [{"layers_to_transform": [0, 5]}, {"rank_pattern": {r"layers\.5\.self_attn\.q_proj": 64}}]
)
def test_layers_that_are_not_alike_are_all_made(options: dict[str, Any]) -> None:
    given = LoraConfig(r=8, target_modules=SOME, **options)
    real = get_peft_model(AutoModelForCausalLM.from_config(CONFIG), given)
    trained = sum(p.nbytes for p in real.parameters() if p.requires_grad)
    plan = fastpeft.plan(CONFIG, adapter=given, **OPTIONS)
    assert trained <= plan.bytes["adapters"] <= trained + 512 * 40


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter: expected an adapter of LoRA, got"):
        fastpeft.plan(CONFIG, adapter=IA3Config(), **OPTIONS)
    with pytest.raises(ValueError, match="targets: expected to be left out, the adapter has its own"):
        fastpeft.plan(CONFIG, adapter=LoraConfig(), targets=SOME, **OPTIONS)
    with pytest.raises(UserError, match=r"lora\.target_modules: no module has the name"):
        fastpeft.plan(CONFIG, adapter=LoraConfig(target_modules=["nothing"]), **OPTIONS)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"--adapter: .* cannot be read as PEFT's adapter_config\.json"):
        read_adapter(str(tmp_path))
