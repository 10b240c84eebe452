"""Learning rates by layer: which parameters are where, and the groups of the optimizer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from fastpeft.errors import UserError
from fastpeft.training.layer_rates import levels, use_layer_rates
from tests.checkpoints import Checkpoints

RATE, DECAY = 1e-2, 0.5
KINDS = {
    "bert": (AutoModelForSequenceClassification, {"task_type": "SEQ_CLS", "bias": "all"}),
    "llama": (AutoModelForCausalLM, {"modules_to_save": ["embed_tokens", "norm"]}),
    "t5": (AutoModelForSeq2SeqLM, {}),
}


def model_of(name: str, checkpoints: Checkpoints) -> Any:
    kind, others = KINDS[name]
    return get_peft_model(kind.from_pretrained(checkpoints[name]), LoraConfig(target_modules="all-linear", **others))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", [("head", 0), ("layer 2 of 2", 1), ("layer 1 of 2", 2), ("embeddings", 3)]),
        ("llama", [("head", 0), ("layer 2 of 2", 1), ("layer 1 of 2", 2), ("embeddings", 3)]),
        ("t5", [("layer 2 of 2", 1), ("layer 1 of 2", 2)]),
    ],
)
def test_every_trained_parameter_is_at_one_level(
    name: str, expected: list[tuple[str, int]], checkpoints: Checkpoints
) -> None:
    model = model_of(name, checkpoints)
    found = levels(model)
    assert [(level.name, level.below) for level in found] == expected
    held = [parameter for level in found for parameter in level.parameters]
    assert sorted(held) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    layers = {level.below: level.parameters for level in found}
    assert all(".1." in name for name in layers[1]) and all(".0." in name for name in layers[2])
    if name == "t5":
        assert {part for part in ("encoder", "decoder") if any(f".{part}." in one for one in layers[1])} == {
            "encoder",
            "decoder",
        }


def test_the_optimizers_groups_have_these_rates(checkpoints: Checkpoints, tmp_path: Any) -> None:
    model = model_of("bert", checkpoints)
    arguments = TrainingArguments(str(tmp_path), learning_rate=RATE, weight_decay=0.1, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments)
    said = use_layer_rates(trainer, "adamw_torch", DECAY)
    trainer.create_optimizer()
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    rates = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    below = {name: level.below for level in levels(model) for name in level.parameters}
    decayed = trainer.get_decay_parameter_names(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates.pop(id(parameter)) == (RATE * DECAY ** below[name], 0.1 if name in decayed else 0.0), name
    assert not rates, "nothing else is trained"
    assert [rate for _, rate, _ in said] == [RATE, RATE / 2, RATE / 4, RATE / 8]
    assert sum(count for _, _, count in said) == model.get_nb_trainable_parameters()[0]


def test_models_without_known_layers_and_other_optimizers_are_refused(checkpoints: Checkpoints, tmp_path: Any) -> None:
    with pytest.raises(UserError, match=r"expected a model of layers .* got Linear"):
        levels(torch.nn.Linear(2, 2))
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(model_of("bert", checkpoints), arguments)
    trainer = SimpleNamespace(args=arguments, model=trainer.model, is_fsdp_enabled=True, is_deepspeed_enabled=False)
    with pytest.raises(UserError, match="expected null with FSDP"):
        use_layer_rates(trainer, "adamw_torch", DECAY)
