"""Bytes kept and products made a layer under each policy."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch import Tensor, nn

import fastpeft
from fastpeft import LayerPolicy
from fastpeft.bench.kept import bytes_kept
from tests.integration.test_mlp_counts import slope, step_products

TOKENS, HIDDEN, MLP, FP32 = 2 * 8, 64, 128, 4


@cache
def of(how: Any, measured: Any) -> float:
    return slope(lambda model, given: measured(fastpeft.accelerate(model, memory=LayerPolicy(how)), given))


def kept(model: nn.Module, given: dict[str, Tensor]) -> float:
    return bytes_kept(model, lambda: model(**given, use_cache=False).loss) / TOKENS  # type: ignore[no-any-return]


def test_bytes_that_a_layer_keeps_for_a_token() -> None:
    """Of an offloaded input the host's copy, which is on a CPU what all are, and no other."""
    assert of("keep", kept) - of("selective", kept) == 2 * MLP * FP32
    assert of("recompute", kept) == of("offload", kept) == HIDDEN * FP32


@pytest.mark.full
@pytest.mark.parametrize("how", ["recompute", "offload"])
def test_what_backward_does_not_read_is_not_made_again(how: str) -> None:
    """Of the 18 products of a layer's forward the two of down, whose result nobody reads, are not."""
    assert of(how, step_products) - of("keep", step_products) == 18 - 2
