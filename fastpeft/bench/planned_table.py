"""The longest contexts that `fastpeft plan` predicts to fit, of well-known models on usual GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from fastpeft.memory.plan.choosing import RECOMPUTE, Need, choose
from fastpeft.memory.plan.largest import STEP, largest_of, most_of
from fastpeft.memory.plan.planning import model_of
from fastpeft.memory.plan.predicting import Model
from fastpeft.memory.plan.rendering import policy_text
from fastpeft.memory.plan.timing import Rates

MODELS = ("llama-3.1-8b", "qwen3-14b", "qwen3-32b", "llama-3.1-70b")
CARDS = (8, 12, 16, 24, 48, 80)
RANK = 16
AT = 8192
"""Tokens from which the longest context is looked for."""


class Cell(NamedTuple):
    """A model on one size of GPU.

    Attributes:
        recomputed: the longest context with recomputed layers, all on the GPU.
        tokens: with any policy.
        need: of these under the cheapest policy that fits; None where nothing does.
    """

    model: str
    card: int
    recomputed: int
    tokens: int
    need: Need | None


def model_for(name: str) -> Model:
    return model_of(name, AT, 1, RANK, "qlora", "all-linear", "bfloat16", "adamw_torch", "auto")[1]


def cell(name: str, model: Model, card: int) -> Cell:
    """One row, GPU memory in GiB."""
    capacity = card << 30
    recomputed = largest_of(model, (RECOMPUTE,), capacity, None)[0]
    tokens = most_of(model, capacity, None)[0]
    while tokens > 0:
        found = choose(model, 1, tokens, capacity, None, Rates())
        if found.total <= capacity:
            return Cell(name, card, recomputed, tokens, found)
        tokens -= STEP
    return Cell(name, card, recomputed, 0, None)


def cells() -> Iterator[Cell]:
    for name in MODELS:
        model = model_for(name)
        for card in CARDS:
            yield cell(name, model, card)


def row(one: Cell) -> str:
    if one.need is None:
        return f"| {one.model} | {one.card} GiB | - | - | nothing fits | | |"
    need, kept = one.need, str(one.recomputed or "-")
    layers = policy_text(need.policy.layers)
    return (
        f"| {one.model} | {one.card} GiB | {kept} | {one.tokens} | {layers} | {need.slowdown:.2f} | "
        f"{need.host / 2**30:.1f} GiB |"
    )


def contexts(found: Sequence[Cell]) -> str:
    return "\n".join(
        [
            "| *predicted* | GPU | tokens, all layers recomputed | tokens, any policy | layers | time | pinned host |",
            "|---|---|---:|---:|---|---:|---:|",
            *map(row, found),
            "",
            f"Predicted, not measured: QLoRA, rank {RANK} on all linear layers, bf16, AdamW, one row, at most the "
            "model's positions. Layers and pinned memory are those of the longest context; time is that of a step "
            f"beside keeping all, told from {Rates().flops / 1e12:.0f} TFLOP/s and {Rates().link / 1e9:.0f} GB/s. "
            f"torch {torch.__version__}; `python -m fastpeft.bench.planned --table`.",
        ]
    )
