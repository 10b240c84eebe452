"""The error budget that every op is held to.

An op may err twice as much as plain PyTorch in the same dtype does, plus one rounding of the largest value:

    max|y - y64|  <=  2 * max|y_torch - y64|  +  eps(dtype) * max|y64|

and the same with the Frobenius norm in place of the maximum. y64 is the oracle: the same computation in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_NORMS: dict[str, Callable[[Tensor], float]] = {
    "max": lambda t: t.abs().max().item(),
    "Frobenius": lambda t: torch.linalg.vector_norm(t).item(),
}


class Deviation(NamedTuple):
    """Of a result from the oracle in one norm, and what it may be."""

    error: float
    budget: float

    @property
    def share(self) -> float:
        return self.error / self.budget if self.budget else 0.0


class OverBudgetError(AssertionError):
    """A result deviates by more than it may; `deviation` says by how much, the message also where."""

    def __init__(self, message: str, deviation: Deviation) -> None:
        super().__init__(message)
        self.deviation = deviation


def assert_within_budget(ours: Tensor, same_dtype: Tensor, oracle64: Tensor, name: str = "output") -> float:
    """Fail unless `ours` is within the budget; arguments and errors as of `deviation`.

    Returns:
        The larger of the two used shares of the budget, in [0, 1].
    """
    return deviation(ours, same_dtype, oracle64, name).share


def deviation(
    ours: Tensor, same_dtype: Tensor, oracle64: Tensor, name: str = "output", times: float = 1.0
) -> Deviation:
    """How far `ours` is from the oracle, in the norm that uses the larger share of its budget.

    Args:
        ours: result of the op under test, floating.
        same_dtype: what plain PyTorch gives in the dtype of `ours`.
        oracle64: what plain PyTorch gives in fp64; compared on its device.
        name: what the tensor is, for the message.
        times: so many budgets may be used.

    Raises:
        OverBudgetError: over so many budgets.
        AssertionError: another shape or dtype, or not finite where it should be (or the reverse).
    """
    _check_alike(ours, same_dtype, oracle64, name)
    if oracle64.numel() == 0:
        return Deviation(0.0, 0.0)
    y64 = oracle64.detach()
    y, y_torch = (t.detach().to(y64.device, torch.float64) for t in (ours, same_dtype))
    y64_rounded = y64.to(ours.dtype).double()
    _check_finite(y, y_torch, y64_rounded, name)
    # Where plain PyTorch overflows, or the value itself does, no error can be measured.
    measurable = y64_rounded.isfinite() & y_torch.isfinite()
    y, y_torch, y64 = (torch.where(measurable, t, 0.0) for t in (y, y_torch, y64))
    eps = torch.finfo(ours.dtype).eps
    found = []
    for norm, measure in _NORMS.items():
        error, theirs = measure(y - y64), measure(y_torch - y64)
        budget = 2 * theirs + eps * measure(y64)
        found.append(Deviation(error, budget))
        if error > times * budget:
            message = _over_budget(name, norm, ours.dtype, error, theirs, budget, y, y_torch, y64)
            raise OverBudgetError(message, found[-1])
    return max(found, key=lambda each: each.share)


def _check_alike(ours: Tensor, same_dtype: Tensor, oracle64: Tensor, name: str) -> None:
    if not ours.is_floating_point() or ours.dtype != same_dtype.dtype:
        raise AssertionError(f"{name}: expected the dtype of plain PyTorch, {same_dtype.dtype}, got {ours.dtype}")
    if oracle64.dtype != torch.float64:
        raise AssertionError(f"{name}: expected an oracle in torch.float64, got {oracle64.dtype}")
    if not ours.shape == same_dtype.shape == oracle64.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (ours, same_dtype, oracle64))
        raise AssertionError(f"{name}: expected one shape for ours, PyTorch's and the oracle's result, got {shapes}")


def _check_finite(y: Tensor, y_torch: Tensor, y64_rounded: Tensor, name: str) -> None:
    """An infinity or NaN is right where the oracle, rounded to the dtype, or plain PyTorch has the same."""
    odd = ~(y.isfinite() | _same(y, y64_rounded) | _same(y, y_torch))
    odd |= y.isfinite() & ~y64_rounded.isfinite() & ~y_torch.isfinite()
    if odd.any():
        where = _first(odd)
        raise AssertionError(
            f"{name}: {int(odd.sum())} of {odd.numel()} elements are not finite where they should be, or the reverse; "
            f"first at {where}: got {y[where].item()}, "
            f"PyTorch {y_torch[where].item()}, oracle {y64_rounded[where].item()}"
        )


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _over_budget(
    name: str,
    norm: str,
    dtype: torch.dtype,
    error: float,
    theirs: float,
    budget: float,
    y: Tensor,
    y_torch: Tensor,
    y64: Tensor,
) -> str:
    worst = _first((y - y64).abs() == (y - y64).abs().max())
    return (
        f"{name}: {norm} error {error:.3e} is over its budget {budget:.3e} "
        f"(PyTorch in {dtype} errs by {theirs:.3e}; max|oracle| {y64.abs().max().item():.3e}; shape {tuple(y.shape)}); "
        f"worst at {worst}: got {y[worst].item():.9g}, "
        f"PyTorch {y_torch[worst].item():.9g}, oracle {y64[worst].item():.9g}"
    )


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())
