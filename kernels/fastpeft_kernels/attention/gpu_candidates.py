"""Checks that need a CUDA GPU: every candidate that is to be had here within budget in all that it does not refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from .candidates import registry
from .candidates.flex_blocks import blocks_of
from .candidates.request import Request
from .choosing import masked_backends
from .gpu_op import Cases, check_cases, no_wait, problem_of
from .keys import masked_key_of
from .problems import MASKS, Shape
from .tunables import TUNABLES

_DEVICE = torch.device("cuda")
_BF16, _FP16 = torch.bfloat16, torch.float16
_SHAPES = (
    *(Shape(), Shape(features=128, v_features=128), Shape(queries=190, keys=333), Shape(queries=333, keys=190)),
    *(Shape(features=80, v_features=80), Shape(features=256, v_features=256), Shape(queries=1)),
)

_OF_SDPA = ("everything", "causal", "keys", "dense")


def checks() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Named checks. Each returns figures, or raises AssertionError. What is not installed is not checked."""
    for label in registry.labels(_DEVICE):
        name = registry.named(label)
        for mask in ("keys", *MASKS) if registry.CANDIDATES[name].beyond_sdpa else _OF_SDPA:
            yield f"attention by {label}, mask {mask}", partial(_check, name, mask, _BF16)
        yield f"attention by {label}, causal fp16", partial(_check, name, "causal", _FP16)
    yield "attention, blocks for FlexAttention wait for nothing", _check_blocks_do_not_wait
    yield "attention, every candidate in problems of the tuner", _check_problems


def _check(name: str, mask: str, dtype: torch.dtype) -> dict[str, Any]:
    """With and without a soft cap. What is compiled for one of the shapes does not count for the others' limit."""
    served: Cases = []
    for shape in _SHAPES:
        for score in ((), ("softcap",)):
            it = problem_of(shape, dtype, (mask,), score)
            q, k, v = (t.detach().requires_grad_() for t in (it.q, it.k, it.v))
            if registry.refusal(name, Request(q, k, v, it.mask, it.scores)) is None:
                served.append((shape, (mask,), score))
    torch._dynamo.reset()
    figures = check_cases(served, dtype, name)
    return {**figures, "served": len(served), "of": 2 * len(_SHAPES)}


def _check_blocks_do_not_wait() -> dict[str, Any]:
    for mask in MASKS:
        if mask != "dense":
            it = problem_of(Shape(), _BF16, (mask,), ())
            blocks_of(it.mask, it.q, it.k)
            with no_wait():
                blocks_of(it.mask, it.q, it.k)
    return {}


def _check_problems() -> dict[str, Any]:
    """Each runs or says why not; some beside ours run where there are some."""
    ran: dict[str, int] = {}
    for mask, score in (("window", ()), ("documents", ()), ("padding", ()), ("causal", ("softcap",))):
        it = problem_of(Shape(), _BF16, (mask,), score)
        key = masked_key_of(it.q, it.k, it.v, it.mask, it.scores, gradients=True)
        assert key is not None
        made = TUNABLES[1].problem(key, _DEVICE)
        for label in masked_backends(_DEVICE):
            try:
                made.run(label)
            except ValueError as error:  # what the tuner leaves out with this reason
                assert "which cannot serve" in str(error), f"{label}: {error}"
            else:
                ran[label] = ran.get(label, 0) + 1
    for label in masked_backends(_DEVICE)[:2]:  # ours and FlexAttention
        assert ran.get(label) == 4, f"{label} ran {ran.get(label, 0)} of 4"
    return ran
