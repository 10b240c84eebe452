"""Is a step of an accelerated model the step of plain PEFT? Loss and every gradient, held against fp64.

The rule is that of the project's tests of whole models: over all tensors our error is in the median at most twice
PEFT's, the budget of every op; one tensor may by chance be several times further off, a wrong number is thousands.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations import bitsandbytes, quantised
from ...integrations.transformers import multiply_experts_one_by_one
from ...verification_states import Wide
from ..left_out import reason_of

MEDIAN = 2.0
ONE = 8.0
ASSUMED = 16.0
"""Roundings in a gradient of PEFT's where no model in fp64 runs; those that do show 4 to 40."""
Step = dict[str, Tensor]
"""The loss, and the gradient of every trainable parameter by its name."""


@dataclass(frozen=True)
class Parity:
    """The quantity that comes closest to its budget, or is furthest beyond: relative error, and what it may be."""

    what: str
    error: float
    budget: float

    @property
    def kept(self) -> bool:
        return self.error <= self.budget  # False for NaN


def step(model: nn.Module, inputs: Mapping[str, Tensor], autocast: bool = False) -> Step:
    """One forward and backward from no gradients; leaves none behind.

    Args:
        model: a model whose output has a loss.
        inputs: keyword arguments of its forward.
        autocast: in bf16, on the CPU.
    """
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach(), **gradients}


def truth(model: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Step, str]:
    """The step of plain PEFT in fp64, over quantised weights as their library decodes them, casts to fp32 left out.

    Args:
        model: one that was not accelerated, and does not run activation checkpointing.

    Returns:
        The step, and "". Where a class does not compute in fp64, that of PEFT as it is, and the reason.

    Raises:
        Exception: whatever the model says when it runs as it is.
    """
    try:
        found = _in_fp64(model, inputs)
        if finite(found):
            return found, ""
        reason = "not finite"
    except Exception as error:
        reason = reason_of(error)
    return step(copy.deepcopy(model), inputs), reason


def _in_fp64(model: nn.Module, inputs: Mapping[str, Tensor]) -> Step:
    wide = copy.deepcopy(model)
    for path, layer in list(wide.named_modules()):
        parent, _, name = path.rpartition(".")
        if bitsandbytes.is_linear_4bit(layer):
            setattr(wide.get_submodule(parent), name, bitsandbytes.dense_linear(layer))
        elif path and (reader := quantised.reader(layer)) is not None:
            setattr(wide.get_submodule(parent), name, reader.dense_linear(layer))
        else:
            multiply_experts_one_by_one(layer)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            return step(wide.double(), {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()})
    finally:
        torch.set_default_dtype(before)


def compare(ours: Step, peft: Step, exact: Step, wide: bool = True) -> Parity:
    """The worst of all tensors and of their median.

    Args:
        ours: the step of the accelerated model.
        peft: of plain PEFT in the same state.
        exact: of plain PEFT in fp64.
        wide: False where `exact` is not in fp64, so that its own rounding has to be assumed.
    """
    if ours.keys() != peft.keys():
        return Parity(f"{min(ours.keys() ^ peft.keys())} has a gradient in one of the two only", math.inf, 0.0)
    mine = {name: _error(value, exact[name]) for name, value in ours.items()}
    theirs = {name: _error(value, exact[name]) for name, value in peft.items()}
    eps = torch.finfo(peft["loss"].dtype).eps * (1.0 if wide else ASSUMED)
    usual = median(theirs.values())
    found = [Parity("median", median(mine.values()), MEDIAN * max(usual, eps))]
    found += [Parity(name, mine[name], ONE * max(theirs[name], usual, eps)) for name in mine]
    return max(found, key=lambda each: math.inf if math.isnan(each.error) else each.error / each.budget)


def finite(values: Step) -> bool:
    return all(value.isfinite().all() for value in values.values())


def _error(value: Tensor, exact: Tensor) -> float:
    scale: Any = exact.double().norm().item() or 1.0
    return (value.double() - exact.double()).norm().item() / scale  # type: ignore[no-any-return]
