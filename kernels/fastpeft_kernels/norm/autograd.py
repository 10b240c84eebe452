"""The norms for autograd: kept are x and one or two numbers a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.device import autocast_off
from ..common.reshaping import reshaped
from ..common.shapes import imitated
from .form import Form
from .library import Gradients, Kept, norm_backward_library, norm_library
from .shapes import gradient_shapes, norm_shapes


class Norm(torch.autograd.Function):
    """y. Nothing of x's size is kept but x itself."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, form: Form, backend: str
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        y, kept = compute(x, weight, bias, gate, form, backend)
        ctx.form, ctx.backend = form, backend
        ctx.save_for_backward(x, weight, bias, gate, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        x, weight, bias, gate, *kept = ctx.saved_tensors
        if dy is None:
            return (None,) * 6
        with autocast_off(x.device):
            found = compute_backward(dy, x, weight, gate, Kept(*kept), ctx.form, ctx.needs_input_grad[:4], ctx.backend)
        dx = None if found.x is None else found.x.view(x.shape)
        dweight = None if found.weight is None else found.weight.to(weight.dtype)
        dbias = None if found.bias is None else found.bias.to(bias.dtype)
        dgate = None if found.gate is None else found.gate.view(gate.shape)
        return dx, dweight, dbias, dgate, None, None


def apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, form: Form, backend: str
) -> Tensor:
    """y, differentiable where grad mode and the inputs ask for it.

    Args:
        backend: "torch", for which autocast must be off, or "triton".
    """
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in (x, weight, bias, gate)]):
        return Norm.apply(x, weight, bias, gate, form, backend)  # type: ignore[no-any-return]
    return compute(x, weight, bias, gate, form, backend)[0]


def compute(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, form: Form, backend: str
) -> tuple[Tensor, Kept]:
    """(y, what backward needs), without a gradient; x and gate (..., features)."""
    shape = x.shape
    if backend == "triton" and x.numel():
        from .forward import norm_triton

        return norm_triton(matrix(x), weight, bias, form, shape, None if gate is None else matrix(gate))
    if imitated(x.device) == "cuda":
        y, kept = norm_shapes(_flat(x), form)
    else:
        y, kept = norm_library(_flat(x), weight, bias, form, None if gate is None else _flat(gate))
    return reshaped(y, shape), kept


def compute_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    kept: Kept,
    form: Form,
    needs: tuple[bool, ...],
    backend: str,
) -> Gradients:
    """The gradients by the implementation that forward took; those of x and gate are matrices."""
    given = gate if gate is None else matrix(gate)
    if backend == "triton" and x.numel():
        from .backward import norm_backward_triton

        return norm_backward_triton(matrix(dy), matrix(x), weight, kept, form, needs, given)
    if imitated(x.device) == "cuda":
        return gradient_shapes(x, needs, gate)
    return norm_backward_library(matrix(dy), matrix(x), weight, kept, form, needs, given)


def matrix(x: Tensor) -> Tensor:
    """x (..., features) as (rows, features) with contiguous columns and rows that do not overlap; a view if it can be.

    An expanded gradient, as of `y.sum()`, is copied.
    """
    if x.is_contiguous() and x.dim() == 3:  # most often, and sooner
        return x.view(x.shape[0] * x.shape[1], x.shape[2])
    rows = _flat(x)
    dense = rows.shape[1] <= 1 or rows.stride(1) == 1
    return rows if dense and (rows.shape[0] <= 1 or rows.stride(0) >= rows.shape[1]) else rows.contiguous()


def _flat(x: Tensor) -> Tensor:
    """(rows, features), also where there are no features."""
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
