"""What the kernels of the norms make, without values: see common/shapes.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .form import Form, wide_dtype
from .library import Gradients, Kept


def norm_shapes(x: Tensor, form: Form) -> tuple[Tensor, Kept]:
    """(y, what backward needs) of x (rows, features)."""
    rstd = x.new_empty(x.shape[0] * form.groups, dtype=wide_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=form.out), Kept(rstd, torch.empty_like(rstd) if form.centred else None)


def gradient_shapes(x: Tensor, needs: tuple[bool, ...], gate: Tensor | None) -> Gradients:
    """The gradients that are wanted, of x and the gate (..., features)."""
    dx = torch.empty_like(x.flatten(0, -2)) if needs[0] else None
    dweight, dbias = (x.new_empty(x.shape[-1:], dtype=wide_dtype(x.dtype)) if need else None for need in needs[1:3])
    dgate = None if gate is None or not needs[3] else torch.empty_like(gate.flatten(0, -2))
    return Gradients(dx, dweight, dbias, dgate)
