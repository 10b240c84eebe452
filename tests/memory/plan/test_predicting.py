"""The predicted peak of a step on this CPU, against what torch's allocator was asked for."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.bench.kept import bytes_kept
from fastpeft.bench.planned import FAMILIES, METHODS, TILE, Case, Family, cases
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy
from fastpeft.memory.trace.composing import Peak
from fastpeft_kernels.common.remembered import forget_remembered

WITHIN = 0.05
REGULAR = [
    Case("llama", "lora", LayerPolicy(kind, streamed), 128)
    for kind, streamed in (("keep", False), ("offload", False), ("recompute", True))
] + [Case("llama", "lora", LayerPolicy("recompute", tile=TILE), 128)]

family = cache(Family)


def off(case: Case) -> float:
    return abs(family(case.family, case.method).compare(case.policy, case.tokens).ratio - 1)


@pytest.mark.parametrize("case", REGULAR, ids=lambda case: case.name)
def test_peak(case: Case) -> None:
    assert off(case) <= WITHIN


@pytest.mark.full
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_every_peak(case: Case) -> None:
    assert off(case) <= WITHIN


@pytest.mark.parametrize("kind", ["selective", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("keep",))])
def test_peak_of_layers_that_do_not_all_do_the_same(kind: Any) -> None:
    """The embeddings' result, which the first layer keeps, is 2 % or more of it."""
    mix = MemoryPolicy((LayerPolicy("recompute"),) * 3 + (LayerPolicy(kind),) * 3)
    assert abs(family("llama", "lora").compare_mix(kind, mix, 128).ratio - 1) <= 0.005


def test_cases_are_of_every_kind() -> None:
    assert len(cases()) >= 48
    assert {case.family for case in cases()} == set(FAMILIES) and {case.method for case in cases()} == set(METHODS)


def peak(policy: LayerPolicy) -> Peak:
    model = family("llama", "lora").predicted
    return model.peak((policy,) * len(model.skeleton.order), 2, 128)


def _loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Without the copy of positions by which a CPU knows a batch again, which neither GPU nor trace has."""
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    forget_remembered()
    return loss


def test_components() -> None:
    """Against the model that was measured: its tensors, and what one forward of it leaves behind."""
    both = family("llama", "lora")
    real = both.model
    trained = sum(p.nbytes for p in real.parameters() if p.requires_grad)
    assert both.predicted.bytes["trained"] == trained and both.predicted.gradients == 0  # the step makes them
    assert both.predicted.bytes["dense"] == sum(p.nbytes for p in real.parameters()) - trained
    ids = torch.zeros((2, 128), dtype=torch.long)
    for policy in (LayerPolicy(), LayerPolicy("selective")):
        model = fastpeft.accelerate(real, memory=policy)
        forward = partial(_loss, model, ids)
        forward()
        found = peak(policy)
        assert found.when == "turn" and found.kept == bytes_kept(model, forward)
    assert peak(LayerPolicy("recompute")).layers == 6 * 2 * 128 * 256 * torch.float32.itemsize
