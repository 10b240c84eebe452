"""What trials of a model's own code have in common: when are two results those of one computation?"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn


def within_budget(ours: Tensor, theirs: Tensor, exact: Tensor, eps: float) -> bool:
    """Row by row: theirs is the exact result within rounding of `eps`, and ours errs at most as an op may.

    That is twice as much as theirs does, a little more in short rows, and one rounding.
    """
    if not ours.shape == theirs.shape == exact.shape or ours.dtype != theirs.dtype:
        return False
    error, reference, size = ((t.double() - exact).norm(dim=-1) for t in (ours, theirs, torch.zeros_like(exact)))
    slack = 2.0 * (1.0 + 4.0 / max(1, exact.shape[-1]) ** 0.5)
    right = reference <= 8.0 * eps * size + torch.finfo(torch.float32).tiny
    return bool((right & (error <= slack * reference + torch.finfo(ours.dtype).eps * size)).all())


def takes(module: nn.Module, arguments: int) -> bool:
    """Whether a module's own forward can be called with so many, by position."""
    try:
        inspect.signature(type(module).forward).bind(module, *range(arguments))
    except TypeError:
        return False
    return True


def failure(error: Exception) -> str:
    """The first line of what a trial raised."""
    return f"trying it failed with {type(error).__name__}: {str(error).partition(chr(10))[0][:100]}"
