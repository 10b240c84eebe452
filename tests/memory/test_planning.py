"""`fastpeft.plan` on a small configuration."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import LlamaConfig

import fastpeft
from fastpeft.memory.choosing import RESERVE, Rates
from fastpeft.memory.planning import Plan, model_of, plan_on
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy
from fastpeft.memory.predicting import Model

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of(CONFIG, 64, 1, 4, "lora", "all-linear", "bfloat16", "adamw_torch", "auto")[1]


def on(model: Model, capacity: int, policy: MemoryPolicy | None = None) -> Plan:
    return plan_on("llama", model, capacity, None, policy, False, Rates())


@pytest.fixture(scope="module")
def roomy(model: Model) -> Plan:
    return on(model, 2 << 30)


def test_static_bytes_are_exact(roomy: Plan) -> None:
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128
    dense = 2 * 512 * 64 + 6 * (layer + 2 * 64) + 64
    ranks = 6 * 4 * (7 * 64 + 2 * 64 + 2 * 32 + 3 * 128)
    assert abs(roomy.bytes["base, dense"] - 2 * dense) <= 512 * 6 * 9  # whole blocks of the allocator
    assert abs(roomy.bytes["adapters"] - 4 * ranks) <= 512 * 6 * 14
    assert roomy.bytes["optimizer"] == 2 * roomy.bytes["adapters"]


def test_what_fits_is_kept(roomy: Plan) -> None:
    assert roomy.fits and set(roomy.policy.of(6)) == {LayerPolicy()} and roomy.need.slowdown == 1.0
    assert str(roomy).endswith("it fits") and not roomy.changes


def test_what_does_not_is_recomputed_as_far_as_needed(model: Model, roomy: Plan) -> None:
    least = on(model, 2 << 30, MemoryPolicy(LayerPolicy("recompute")))
    assert least.need.total < roomy.need.total
    used = (roomy.need.total + least.need.total) // 2 - int(RESERVE * (2 << 30))
    tight = on(model, int(used / (1 - RESERVE)))
    kinds = [layer.activations for layer in tight.policy.of(6)]
    assert tight.fits and kinds == sorted(kinds, reverse=True) and set(kinds) == {"recompute", "keep"}
    assert 1.0 < tight.need.slowdown < 1.6


def test_too_little(model: Model) -> None:
    small = on(model, 256 << 20)
    assert not small.fits and small.changes and "it does not fit" in str(small)
    found = json.loads(json.dumps(small.to_dict()))
    assert found["schema"] == 1 and found["fits"] is False and len(found["policy"]) == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpu_memory": "24G"}, "gpu_memory: expected a size"),
        ({"host_memory": "much"}, "host_memory: expected a size"),
        ({"seq": 0}, "seq: expected 1 to"),
        ({"batch": -1}, "batch: expected 1 to"),
        ({"method": "magic"}, "method: expected one of"),
        ({"optimizer": "adam"}, "optimizer: expected one of"),
        ({"dtype": "int8"}, "dtype: expected one of"),
        ({"task": "chess"}, "task: expected one of"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fastpeft.plan(CONFIG, **({"gpu_memory": "2GiB", "seq": 64} | options))


def test_a_policy_for_another_number_of_layers(model: Model) -> None:
    with pytest.raises(ValueError, match="layers: expected 6 policies"):
        on(model, 2 << 30, MemoryPolicy((LayerPolicy(),) * 5))
