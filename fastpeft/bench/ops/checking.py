"""Whether a peer computes the case: its outputs and gradients beside PyTorch's and the float64 oracle's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpeft_kernels.common.budget import Deviation, deviation

from .case import Forward, Inputs, OpCase


@dataclass(frozen=True)
class Truth:
    """Results of the reference: in the case's dtype, whose error sets the budget, and in float64.

    A result of one number, such as a loss, is held in the case's dtype though it may come in a wider one: that of
    PyTorch can be right by chance to more digits than the inputs have.
    """

    same: Sequence[Tensor]
    exact: Sequence[Tensor]
    dtype: torch.dtype

    def deviation(self, found: Sequence[Tensor], times: float = 1.0) -> Deviation:
        """Of the result that uses the largest share of its budget.

        Raises:
            OverBudgetError: one is over so many times its budget.
            AssertionError: another number of results, shape or dtype, or not finite where it should be.
        """
        if len(found) != len(self.exact):
            raise AssertionError(f"results: expected {len(self.exact)}, got {len(found)}")
        every = []
        for i, (ours, same, exact) in enumerate(zip(found, self.same, self.exact, strict=True)):
            if exact.numel() == 1 and ours.dtype == same.dtype:
                ours, same = ours.to(self.dtype), same.to(self.dtype)
            every.append(deviation(ours, same, exact, name=f"result {i}", times=times))
        return max(every, key=lambda one: one.share)


def results(forward: Forward, inputs: Inputs) -> list[Tensor]:
    """Outputs, then the gradient of each wanted tensor."""
    outputs = forward()
    gradients = torch.autograd.grad(outputs, inputs.wanted, inputs.dys) if inputs.wanted else ()
    return [*(y.detach() for y in outputs), *gradients]


def truth(case: OpCase, inputs: Inputs, device: str, seed: int) -> Truth:
    """What the case's results are.

    Args:
        case: whose reference computes.
        inputs: of `seed` in the case's dtype.
        device: where the oracle computes too.
        seed: of the inputs.

    Raises:
        ValueError: the case makes other numbers in float64 than in its own dtype.
    """
    exact = case.make(device, torch.float64, seed)
    for name, tensor in inputs.tensors.items():
        if not torch.equal(exact.tensors[name].double(), tensor.double()):
            raise ValueError(f"make: expected the numbers of {case.dtype} in float64 too, got others in {name!r}")
    return Truth(results(case.reference(inputs), inputs), results(case.reference(exact), exact), case.dtype)
