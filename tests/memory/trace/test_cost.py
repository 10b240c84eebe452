"""What a plan costs, counted: nothing is traced twice, and torch does nothing of its own at each operation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

import fastpeft
from fastpeft.memory.plan import predicting
from fastpeft.memory.plan.choosing import RESERVE
from fastpeft.memory.trace.live import LiveBytes

MOST = 24
"""Traces of a plan for one GPU: of policies and their mixes, and of other lengths and batches."""


def test_torch_does_not_see_to_compilation_at_each_operation() -> None:
    """torch wraps the method of any other mode."""

    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    assert hasattr(Other.__torch_dispatch__, "__wrapped__")
    assert not hasattr(LiveBytes.__torch_dispatch__, "__wrapped__")


def test_no_step_is_traced_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: Counter[Any] = Counter()
    trace = predicting.trace

    def counted(model: Any, layers: Any, batch: Any, *args: Any, **options: Any) -> Any:
        traced[batch["input_ids"].shape, tuple(layer.fastpeft_memory for layer in layers.values())] += 1
        return trace(model, layers, batch, *args, **options)

    monkeypatch.setattr(predicting, "trace", counted)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=32, num_attention_heads=2
    )
    least = fastpeft.plan(config, gpu_memory="8GiB", seq=256, method="lora", largest=False)
    assert len(traced) == 2 and least.fits
    tight = int((least.need.total - int(RESERVE * (8 << 30)) - (1 << 20)) / (1 - RESERVE))
    traced.clear()
    assert fastpeft.plan(config, gpu_memory=tight, seq=256, method="lora")
    assert set(traced.values()) == {1}
    assert len(traced) <= MOST
