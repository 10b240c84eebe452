"""Streamed layers compute the bits of resident ones, with no more of them on the device than the ring has places."""

from __future__ import annotations

from typing import Any

import pytest

import fastpeft
from fastpeft import LayerPolicy, MemoryPolicy
from fastpeft.memory import stowing
from fastpeft.memory.layers import model_layers
from tests.memory.test_policies import full, seeded, started


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of tests have small matrices."""
    monkeypatch.setattr(stowing, "SMALLEST", 16)


@pytest.mark.parametrize("how", ["keep", "selective", "recompute", "offload"])
@pytest.mark.parametrize("name", ["llama", *full("t5", "bert")])
def test_the_same_bits(name: str, how: Any) -> None:
    model, given, wanted = started(name)
    fastpeft.accelerate(model, memory=MemoryPolicy(LayerPolicy(how, streamed=True), ring=1))
    assert seeded(model, given).equals(wanted)
