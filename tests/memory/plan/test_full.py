"""Plans for trainings of all weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fastpeft
from fastpeft.memory.plan.optimizer_state import state_sizes
from fastpeft.memory.plan.predicting import Model, Setting
from fastpeft.memory.policy import LayerPolicy

from .seeing import measured

WITHIN = 0.05
CONFIG = LlamaConfig(
    vocab_size=2000, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
OPTIONS: dict[str, Any] = {"gpu_memory": "4GiB", "seq": 64, "method": "full", "largest": False}


@pytest.mark.parametrize("kind", ["recompute", *(pytest.param(k, marks=pytest.mark.full) for k in ("keep", "offload"))])
def test_peak(kind: Any) -> None:
    policy = LayerPolicy(kind)
    told = Model(
        Setting(CONFIG, "causal-lm", 160, 2, False, torch.float32, None, device="cpu", accumulated=False, full=True)
    )
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32).train()
    assert told.bytes["trained"] == sum(p.nbytes for p in model.parameters()) and told.bytes["dense"] == 0
    ids = torch.randint(4, 2000, (2, 160))
    assert (
        abs(told.peak((policy,) * 6, 2, 160).size / measured(model, {"input_ids": ids, "labels": ids}, policy) - 1)
        <= WITHIN
    )


def test_a_plan() -> None:
    """Weights, gradients and the optimizer's state in bf16, or the state in 8 bits."""
    plan = fastpeft.plan(CONFIG, **OPTIONS)
    weights = plan.bytes["trained weights"]
    assert plan.settings["method"] == "full" and "rank" not in plan.settings and "adapters" not in plan.bytes
    assert (
        plan.bytes["gradients"] == weights and plan.bytes["optimizer"] == 2 * weights and plan.bytes["base, dense"] == 0
    )
    assert fastpeft.plan(CONFIG, optimizer="adamw_8bit", **OPTIONS).bytes["optimizer"] < 1.1 * weights
    assert state_sizes("paged_adamw_32bit", 8, "cpu", 2) == [32, 32] and state_sizes("adamw_torch", 8, "cpu", 2) == [
        16,
        16,
    ]


def test_what_has_no_part_in_it() -> None:
    with pytest.raises(ValueError, match="rank: expected to be left out, a training of all weights has its own"):
        fastpeft.plan(CONFIG, rank=4, **OPTIONS)
