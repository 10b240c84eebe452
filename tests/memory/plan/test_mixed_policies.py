"""Layers that do not all do the same: put together from a few traced layers, beside every layer traced as it is."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, T5Config

from fastpeft.config import LoraSection
from fastpeft.memory.plan.predicting import Model, Setting
from fastpeft.memory.policy import LayerPolicy

ROWS, TOKENS, WIDTH, COUNT = 1, 512, 128, 7
HIDDEN = ROWS * TOKENS * WIDTH * torch.bfloat16.itemsize
KEEP, SELECTIVE, RECOMPUTE, OFFLOAD = (LayerPolicy(kind) for kind in ("keep", "selective", "recompute", "offload"))
MIXES = ((SELECTIVE, KEEP), (RECOMPUTE, KEEP), (RECOMPUTE, SELECTIVE), (OFFLOAD, RECOMPUTE))


def config(family: str) -> Any:
    if family == "llama":
        return LlamaConfig(
            vocab_size=512, hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=COUNT, num_attention_heads=4
        )
    return T5Config(
        vocab_size=512, d_model=WIDTH, d_kv=32, d_ff=512, num_heads=4, num_layers=COUNT,
        num_decoder_layers=COUNT, feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip


@cache
def model(family: str, whole: bool) -> Model:
    task = "causal-lm" if family == "llama" else "seq2seq-lm"
    return Model(Setting(config(family), task, TOKENS, ROWS, False, torch.bfloat16, LoraSection()), whole)


def sizes(family: str, first: LayerPolicy, some: int, others: LayerPolicy) -> tuple[int, int]:
    """Bytes of the peak: (composed, traced)."""
    count = len(model(family, True).skeleton.order)
    policies = (first,) * (some % count) + (others,) * (count - some % count)
    found = [model(family, whole).peak(policies, ROWS, TOKENS) for whole in (False, True)]
    return found[0].size, found[1].size


@pytest.mark.parametrize("some", [1, 3, -1])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: f"{mix[0].activations}, {mix[1].activations}")
@pytest.mark.parametrize("family", ["llama", pytest.param("t5", marks=pytest.mark.full)])
def test_the_embeddings_result_stays_as_long_as_the_first_layer_keeps_it(
    family: str, mix: tuple[LayerPolicy, LayerPolicy], some: int
) -> None:
    composed, traced = sizes(family, mix[0], some, mix[1])
    if OFFLOAD in mix:  # the last layer of those that leave is taken for one in the middle, which fetches one more
        assert traced <= composed <= traced + HIDDEN
    else:
        assert composed == traced


def test_layers_stand_for_others() -> None:
    traced = model("llama", False)
    assert len(traced.skeleton.layers) < COUNT and len(model("llama", True).skeleton.layers) == COUNT
