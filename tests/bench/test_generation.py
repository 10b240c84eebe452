"""Generation is measured in every state of the adapters, on models that generate the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastpeft
from fastpeft.bench.generation import STATES, GenerationCase, measure

SMALL = {"hidden": 64, "layers": 1, "prompt": 5, "tokens": 3}


@pytest.mark.parametrize(("family", "state"), [*(("llama", state) for state in STATES), ("t5", "active")])
def test_tokens_a_second_of_each_peer(family: str, state: str) -> None:
    samples = measure(GenerationCase(family, "lora", 2, state, **SMALL), rounds=2)
    assert {name: len(speeds) for name, speeds in samples.items()} == {"peft": 2, "fastpeft": 2, "peft again": 2}
    assert all(speed > 0 for speeds in samples.values() for speed in speeds)


def test_other_tokens_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(model: Any) -> Any:
        with torch.no_grad():
            model.get_output_embeddings().weight.neg_()
        return model

    monkeypatch.setattr(fastpeft, "accelerate", spoiled)
    with pytest.raises(RuntimeError, match=r"llama lora 1x64 2x3 tokens: the accelerated model generates other tokens"):
        measure(GenerationCase("llama", "lora", 2, **SMALL), rounds=1)
