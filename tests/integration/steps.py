"""One step of a model: ours, PEFT's, and the same in fp64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SLACK = 4.0
"""Whole models: our rounding and PEFT's are independent of each other and grow on the way through the layers, so that
one may by chance be some times the other. A wrong number is thousands of times."""


@dataclass
class Step:
    """Loss and gradients of one forward and backward."""

    loss: Tensor
    gradients: dict[str, Tensor]

    def equals(self, other: Step) -> bool:
        """Bit for bit."""
        return (
            torch.equal(self.loss, other.loss)
            and self.gradients.keys() == other.gradients.keys()
            and all(torch.equal(g, other.gradients[name]) for name, g in self.gradients.items())
        )


def step(model: nn.Module, inputs: Mapping[str, Any]) -> Step:
    """One forward and backward from no gradients; leaves none behind."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Step(loss.detach(), gradients)


def truth(model: nn.Module, inputs: Mapping[str, Any]) -> Step:
    """The step of plain PEFT in fp64. `model` is a dense one that was not accelerated."""
    wide = copy.deepcopy(model).double()
    return step(wide, {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()})


def assert_step_close(ours: Step, peft: Step, exact: Step) -> None:
    """Our error against fp64 is at most SLACK times PEFT's, or of one rounding; the same parameters have gradients."""
    assert ours.gradients.keys() == peft.gradients.keys() == exact.gradients.keys() != set()
    pairs = {name: (ours.gradients[name], peft.gradients[name], exact.gradients[name]) for name in exact.gradients}
    floor = max(_error(p, e) for _, p, e in pairs.values())  # a loss is close by chance
    _assert_close("loss", ours.loss, peft.loss, exact.loss, floor)
    for name, (mine, theirs, true) in pairs.items():
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        _assert_close(name, mine, theirs, true)


def assert_close(ours: Tensor, peft: Tensor, exact: Tensor) -> None:
    """The same for one tensor."""
    assert ours.dtype == peft.dtype and ours.shape == peft.shape
    _assert_close("tensor", ours, peft, exact)


def _assert_close(name: str, ours: Tensor, peft: Tensor, exact: Tensor, floor: float = 0.0) -> None:
    budget = SLACK * max(_error(peft, exact), torch.finfo(ours.dtype).eps, floor)
    error = _error(ours, exact)
    assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


def _error(value: Tensor, exact: Tensor) -> float:
    scale = exact.double().norm().item() or 1.0
    return (value.double() - exact.double()).norm().item() / scale
