"""A loop as a user has it, watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastpeft
from tests.integration.models import batch

Batches = Callable[[nn.Module], dict[str, Tensor]]


def kinds(watch: Any) -> list[str]:
    return [notice.kind for notice in watch.notices]


def loop(
    model: nn.Module,
    steps: int = 9,
    *,
    batches: Batches = batch,
    rate: float = 1e-2,
    at: Callable[[int], object] = lambda step: None,
    train: Any = None,
    **given: Any,
) -> Any:
    """A user's own; `at` is called before each step. Gives what watched."""
    optimizer = torch.optim.AdamW(train or [p for p in model.parameters() if p.requires_grad], lr=rate)
    with fastpeft.watch(model, **given) as watch:
        for step in range(1, steps + 1):
            at(step)
            model(**batches(model)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return watch
