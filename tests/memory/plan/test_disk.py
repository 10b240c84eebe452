"""Streamed weights that the host's memory has no room for, in plans: they wait on the disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from fastpeft.memory.plan.choosing import GRAIN, LEAST, RESERVE, Need, choose, need, on_disk, tiled
from fastpeft.memory.plan.largest import EXTREMES, largest_of
from fastpeft.memory.plan.planning import Plan, model_of, plan_on
from fastpeft.memory.plan.predicting import Model
from fastpeft.memory.plan.timing import Rates
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy
from fastpeft.memory.sizes import gib_above

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=2
)  # fmt: skip
SEQ, GPU = 64, 1 << 30
STREAMED = LayerPolicy("recompute", streamed=True)
EVERY = MemoryPolicy((STREAMED,) * 6)


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of(CONFIG, SEQ, 1, 4, "qlora", "all-linear", "bfloat16", "adamw_torch", "auto")[1]


def needed(model: Model, policy: MemoryPolicy = EVERY, host: int | None = None, rates: Rates | None = None) -> Need:
    return need(model, policy, 1, SEQ, GPU, rates or Rates(), host)


@pytest.fixture(scope="module")
def tight(model: Model) -> int:
    """GPU memory in which all layers must take turns."""
    return least_of(model)


def least_of(model: Model) -> int:
    return int((needed(model).total - int(RESERVE * GPU)) / (1 - RESERVE)) + (64 << 10)


def on(model: Model, gpu: int, host: int | None, rates: Rates | None = None) -> Plan:
    return plan_on("llama", model, gpu, host, None, False, rates or Rates())


def test_where_the_hosts_memory_ends(model: Model, tight: int) -> None:
    """As much as has room is in the host's memory, what comes first of it; the rest waits."""
    enough = on(model, tight, None)
    weights = sum(size for size, each in zip(model.streamed_bytes, enough.policy.of(6), strict=True) if each.streamed)
    assert enough.fits and enough.need.host == weights > 0 == enough.need.disk and enough.policy.host_memory is None
    assert on(model, tight, weights).policy == enough.policy, "there is room for all"
    half = on(model, tight, weights // 2)
    assert half.fits and (half.need.host, half.need.disk) == (weights // 2, weights - weights // 2)
    assert half.policy == replace(enough.policy, host_memory=weights // 2)
    assert half.need.total == enough.need.total and half.need.slowdown > enough.need.slowdown
    none = on(model, tight, 1)
    assert none.fits and none.need.disk >= weights - 1 and none.to_dict()["bytes"]["disk"] == none.need.disk


def test_who_comes_first(model: Model) -> None:
    sizes = model.streamed_bytes
    assert on_disk(model, (STREAMED,) * 6, None) == [0] * 6
    assert on_disk(model, (STREAMED,) * 6, sizes[0] + 100) == [0, sizes[1] - 100, *sizes[2:]]
    assert on_disk(model, (LayerPolicy(), *(STREAMED,) * 5), sizes[1]) == [0, 0, *sizes[2:]]


def test_inputs_come_before_weights(model: Model) -> None:
    """Those are pinned; a policy's own limit is kept where more has room."""
    policy = MemoryPolicy((LayerPolicy("offload", streamed=True),) * 6)
    inputs = 6 * SEQ * 256 * 2
    assert needed(model, policy, inputs + 1000).policy.host_memory == 1000
    assert needed(model, policy, inputs - 1).host == inputs
    for host in (None, inputs + 3000):
        limited = needed(model, replace(policy, host_memory=2000), host)
        assert (limited.host, limited.policy.host_memory) == (inputs + 2000, 2000)


def test_only_4_bit_weights_wait() -> None:
    dense = model_of(CONFIG, SEQ, 1, 4, "lora", "all-linear", "bfloat16", "adamw_torch", "auto")[1]
    assert needed(dense).host == needed(dense, host=0).host == sum(dense.streamed_bytes)
    gpu = least_of(dense)
    short = on(dense, gpu, 1)
    assert on(dense, gpu, None).fits and not short.fits and short.need.total <= gpu and short.least_host is not None
    assert on(dense, gpu, short.least_host).fits and not on(dense, gpu, short.least_host - GRAIN).fits
    assert short.changes == (f"host memory of {gib_above(short.least_host):.2f} GiB",)
    inputs = needed(dense, MemoryPolicy(LayerPolicy("offload")))
    given = plan_on("llama", dense, GPU, 1, inputs.policy, False, Rates())
    assert given.least_host == -(-inputs.host // GRAIN) * GRAIN


def test_the_least_has_tiles() -> None:
    """Whatever the GPU has, what is named where nothing fits is the least of all."""
    tokens = 8192
    model = model_of(CONFIG, tokens, 1, 4, "qlora", "all-linear", "bfloat16", "adamw_torch", "auto")[1]
    least = need(model, MemoryPolicy(tiled(LEAST)), 1, tokens, 1, Rates()).total
    assert least < need(model, MemoryPolicy(LEAST), 1, tokens, 1, Rates()).total
    assert choose(model, 1, tokens, 1, None, Rates()).total == least


def test_what_the_disk_costs(model: Model) -> None:
    """Each layer's bytes are read in both passes, while it computes."""
    fast, slow = (needed(model, host=0, rates=Rates(disk=disk)) for disk in (2e9, 1e9))
    assert fast.read_hidden_from is not None and slow.read_hidden_from is not None
    assert abs(slow.read_hidden_from - 2 * fast.read_hidden_from) <= 2
    assert slow.hidden_from == fast.hidden_from == needed(model).hidden_from
    assert slow.slowdown == pytest.approx(2 * fast.slowdown)  # so few tokens take no time
    assert needed(model).read_hidden_from is None
    at_once = needed(model, host=0, rates=Rates(disk=1e15))
    assert at_once.slowdown == needed(model).slowdown


def test_what_is_said(model: Model, tight: int) -> None:
    said = str(on(model, tight, 1, Rates(disk=3e9)))
    assert "weights on the disk" in said and "load the model with mapped=True" in said and said.endswith("it fits")
    assert f"reads from the disk do not hide behind computing: {SEQ} tokens a step, they do from" in said
    assert "told from 3 GB/s, not measured" in said and "a step reads 0.0" in said
    assert "disk" not in str(on(model, tight, None))


def test_the_longest_context_has_the_hosts_memory_for_its_inputs(model: Model, tight: int) -> None:
    host = 6 * 512 * 256 * 2  # of 512 tokens, less than the weights
    assert host < sum(model.streamed_bytes)
    assert 0 < largest_of(model, EXTREMES[:1], 2 * GPU, host)[0] <= 512


@pytest.mark.full
def test_some_inputs_may_have_room_where_all_have_not() -> None:
    """Only as many as the GPU has no room for."""
    tokens, inputs = 1024, 1024 * 256 * 2
    dense = model_of(CONFIG, tokens, 1, 4, "lora", "all-linear", "bfloat16", "adamw_torch", "auto")[1]
    mix = MemoryPolicy((LayerPolicy("offload"),) * 4 + (LayerPolicy("recompute"),) * 2)
    gpu = int((need(dense, mix, 1, tokens, GPU, Rates()).total - int(RESERVE * GPU)) / (1 - RESERVE)) + (64 << 10)
    found = plan_on("llama", dense, gpu, 4 * inputs, None, True, Rates())
    assert found.fits and found.policy == mix and (found.most_sequence or 0) >= tokens
    less = plan_on("llama", dense, gpu, 4 * inputs - 1, None, False, Rates())
    assert any(layer.streamed for layer in less.policy.of(6)), "too few have room"
