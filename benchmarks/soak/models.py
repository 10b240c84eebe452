"""Small models of several kinds, accelerated in several ways, and ragged batches for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch

import fastpeft
from fastpeft.bench.methods import lora
from fastpeft.bench.steps import StepCase, base_model, build, targets
from fastpeft.memory.policy import LayerPolicy, MemoryPolicy

WORDS, ROWS, LONGEST, WINDOW = 128, 3, 64, 24
TINY = StepCase("llama", "lora", torch.float32, hidden=64, layers=1, rank=4, dropout=0.1, words=WORDS)
NAMES = ("first", "second", "third")


class Kind(NamedTuple):
    """A model and how it is accelerated.

    Attributes:
        make: the PEFT model.
        switches: of `accelerate`.
        mixed: whether each row of a batch has one of NAMES for its adapter.
    """

    make: Callable[[], Any]
    switches: dict[str, Any]
    mixed: bool = False


def _mixed() -> Any:
    model = base_model(TINY)
    return lora(names=NAMES, r=4)(model, targets(model)).train()


def _of(**changes: Any) -> Callable[[], Any]:
    return lambda: build(replace(TINY, **changes), "cpu")


KINDS = {
    "decoder over NF4, checkpointed": Kind(_of(method="qlora", checkpointing=True), {}),
    "decoder, tiles": Kind(_of(), {"memory": MemoryPolicy(LayerPolicy("recompute", tile=32), decoded=1 << 20)}),
    "decoder over NF4, offloaded": Kind(
        _of(method="qlora", layers=2), {"memory": MemoryPolicy(LayerPolicy("offload"))}
    ),
    "encoder, DoRA": Kind(_of(family="bert", method="dora"), {}),
    "encoder-decoder": Kind(_of(family="t5"), {"mlp": "recompute"}),
    "mixture of experts": Kind(_of(family="moe", dropout=0.0), {}),
    "rows of several adapters": Kind(_mixed, {}, mixed=True),
}


def batch(kind: str, chance: random.Random, progress: float) -> dict[str, Any]:
    """Token ids with padding and labels, of a size that is drawn.

    Args:
        progress: from 0 to 1. Lengths are drawn from a window that slides from long to short, so that new ones come to
            the end, and none that needs more memory than those before.
    """
    longest = round(LONGEST - (LONGEST - WINDOW) * progress)
    rows, tokens = chance.randint(1, ROWS), chance.randint(longest - WINDOW + 1, longest)
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    ids = torch.randint(3, WORDS, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, chance.randint(1, tokens) :] = 0
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if kind.startswith("encoder,"):
        return {**given, "labels": ids[:, 0] % 2}
    if kind == "encoder-decoder":
        return {**given, "labels": ids[:, : chance.randint(1, tokens)].clone()}
    return {**given, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}


def step(model: Any, kind: str, given: dict[str, Any], chance: random.Random) -> None:
    """Forward and backward."""
    _, *others = given["input_ids"]
    names = [chance.choice(NAMES), *(chance.choice((*NAMES, "__base__")) for _ in others)]
    with fastpeft.mixed_batch(model, names) if KINDS[kind].mixed else nullcontext():
        model(**given).loss.backward()
