"""One step of a model: ours, PEFT's, and the same in fp64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fastpeft

MEDIAN = 2.0
"""Over all gradients of a model our error is at most twice PEFT's: the budget of every op."""

SLACK = 8.0
"""One tensor of a whole model: our rounding and PEFT's are independent of each other and grow on the way through the
layers. On 40 random models of each kind a gradient was by chance up to 5 times further off than PEFT's, with a mean of
1.0 to 1.2. A wrong number is thousands of times."""


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
    """Our errors against fp64 are in the median at most MEDIAN times PEFT's, each one at most SLACK times."""
    assert ours.gradients.keys() == peft.gradients.keys() == exact.gradients.keys() != set()
    ours_all = [_error(ours.gradients[name], exact.gradients[name]) for name in exact.gradients]
    peft_all = [_error(peft.gradients[name], exact.gradients[name]) for name in exact.gradients]
    usual = median(peft_all)  # one gradient, or the loss, can be close by chance
    eps = torch.finfo(ours.loss.dtype).eps
    assert median(ours_all) <= MEDIAN * max(usual, eps), f"median {median(ours_all):.2e}, PEFT's {usual:.2e}"
    _assert_close("loss", ours.loss, peft.loss, exact.loss, usual)
    for name, mine in ours.gradients.items():
        theirs = peft.gradients[name]
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        _assert_close(name, mine, theirs, exact.gradients[name], usual)


def assert_accelerated_close(model: nn.Module, inputs: Mapping[str, Any], exact: Step) -> None:
    """Accelerates; then `assert_step_close` against the model as it was, twice: the first step finds the siblings."""
    peft = step(model, inputs)
    fastpeft.accelerate(model)
    for _ in range(2):
        assert_step_close(step(model, inputs), peft, exact)


def assert_close(ours: Tensor, peft: Tensor, exact: Tensor) -> None:
    """The same for one tensor."""
    assert ours.dtype == peft.dtype and ours.shape == peft.shape
    _assert_close("tensor", ours, peft, exact)


def assert_each_close(ours: Tensor, peft: Tensor, exact: Tensor) -> None:
    """The same for each row of (rows, features); one that is close by chance is measured by the others' median."""
    assert ours.dtype == peft.dtype and ours.shape == peft.shape == exact.shape
    rows = list(zip(ours, peft, exact, strict=True))
    usual = median(_error(theirs, true) for _, theirs, true in rows)
    for i, (mine, theirs, true) in enumerate(rows):
        _assert_close(f"row {i}", mine, theirs, true, usual)


def _assert_close(name: str, ours: Tensor, peft: Tensor, exact: Tensor, floor: float = 0.0) -> None:
    budget = SLACK * max(_error(peft, exact), torch.finfo(ours.dtype).eps, floor)
    error = _error(ours, exact)
    assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"


def _error(value: Tensor, exact: Tensor) -> float:
    scale = exact.double().norm().item() or 1.0
    return (value.double() - exact.double()).norm().item() / scale
