"""Bytes kept and products made a layer under each policy: the slope between models of two depths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft import LayerPolicy
from fastpeft.bench.kept import bytes_kept
from fastpeft.memory.policy import ACTIVATIONS
from tests.integration.models import make_base, with_lora
from tests.integration.steps import step
from tests.integration.test_mlp_counts import step_products

TOKENS, HIDDEN, MLP, FP32 = 2 * 8, 64, 128, 4


def slopes(measured: Callable[[nn.Module, dict[str, Tensor]], float], *policies: Any) -> list[float]:
    found = []
    for depth in (2, 4):
        base = make_base(num_hidden_layers=depth, hidden_size=HIDDEN, intermediate_size=MLP, head_dim=16)
        model, ids = fastpeft.accelerate(with_lora(base), attention=False), torch.randint(3, 90, (2, 8))
        given = {"input_ids": ids, "labels": ids}
        step(model, given)
        found.append([])
        for how in policies:
            fastpeft.accelerate(model, attention=False, memory=LayerPolicy(how))
            found[-1].append(measured(model, given))
    return [(deep - shallow) / 2 for shallow, deep in zip(*found, strict=True)]


def kept(model: nn.Module, given: dict[str, Tensor]) -> float:
    return bytes_kept(model, lambda: model(**given, use_cache=False).loss) / TOKENS  # type: ignore[no-any-return]


def test_bytes_that_a_layer_keeps_for_a_token() -> None:
    """Of an offloaded input the host's copy, which is on a CPU what all are, and no other."""
    keep, selective, recompute, offload = slopes(kept, *ACTIVATIONS)
    assert keep - selective == 2 * MLP * FP32
    assert recompute == offload == HIDDEN * FP32


@pytest.mark.full
def test_what_backward_does_not_read_is_not_made_again() -> None:
    """Of the 18 products of a layer's forward the two of down, whose result nobody reads, are not."""
    keep, recompute, offload = slopes(step_products, "keep", "recompute", "offload")
    assert recompute - keep == offload - keep == 18 - 2
