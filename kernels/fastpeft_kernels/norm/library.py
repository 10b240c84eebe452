"""The norms by PyTorch's operations: few passes, a block of rows at a time, in fp32 (fp64 in fp64)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .form import Form, wide_dtype

_BLOCK = 1 << 17  # elements, of which a few copies stay in a processor's second-level cache


class Kept(NamedTuple):
    """What a forward pass leaves for backward: (rows,) each, (rows, groups) in groups, fp32 or fp64; mean is None for
    RMSNorm."""

    rstd: Tensor
    mean: Tensor | None


class Gradients(NamedTuple):
    """Those that were asked for; of weight and bias in fp32, or fp64."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    gate: Tensor | None = None


def norm_library(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form, gate: Tensor | None = None
) -> tuple[Tensor, Kept]:
    """(y, what backward needs); x, gate: (rows, features), weight and bias: (features,)."""
    shape, scale = x.shape, _grouped(_scale(weight, form, x), form)
    x, gate = _grouped(x, form), _grouped(gate, form)
    y = torch.empty(x.shape, dtype=form.out, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=wide_dtype(x.dtype), device=x.device)
    mean = torch.empty_like(rstd) if form.centred else None
    for block in _blocks(x):
        wide = x[block].to(rstd.dtype)
        factor = None if gate is None else _factor(gate[block].to(rstd.dtype), form)
        if factor is not None and not form.norm_before_gate:
            wide = wide * factor
        if mean is not None:
            torch.mean(wide, -1, out=mean[block])
            wide = wide - mean[block].unsqueeze(-1)
        torch.linalg.vecdot(wide, wide, out=rstd[block])
        rstd[block].div_(x.shape[-1]).add_(form.eps).rsqrt_()
        target = y[block] if y.dtype == wide.dtype else None
        z = torch.mul(wide, rstd[block].unsqueeze(-1), out=target)
        if form.middle is not None:
            z = z.to(form.middle).to(rstd.dtype)
        if scale is not None:
            z.mul_(scale)
        if bias is not None:
            z.add_(bias)
        if factor is not None and form.norm_before_gate:
            z.mul_(factor)
        if z is not target:
            y[block].copy_(z)
    return y.view(shape), Kept(rstd, mean)


def norm_backward_library(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    kept: Kept,
    form: Form,
    needs: tuple[bool, ...],
    gate: Tensor | None = None,
) -> Gradients:
    """Gradients of x, weight, bias and gate as far as `needs` says."""
    if gate is not None:
        return _gated_backward(dy, x, weight, kept, form, needs, gate)
    rstd, mean = kept
    scale = _scale(weight, form, x)
    dx = torch.empty_like(x) if needs[0] else None
    dweight, dbias = (x.new_zeros(x.shape[1:], dtype=rstd.dtype) if need else None for need in needs[1:3])
    for block in _blocks(x):
        factor = rstd[block].unsqueeze(-1)
        normalised = x[block].to(rstd.dtype)
        if mean is not None:
            normalised = normalised - mean[block].unsqueeze(-1)
        gradient = dy[block].to(rstd.dtype)
        if dbias is not None:
            dbias += gradient.sum(0)
        if dweight is not None:
            dweight += (normalised * factor).mul_(gradient).sum(0)
        if dx is None:
            continue
        gradient = gradient * factor if scale is None else torch.mul(gradient, scale).mul_(factor)
        share = torch.linalg.vecdot(gradient, normalised).mul_(rstd[block]).mul_(rstd[block]).div_(-x.shape[1])
        if mean is not None:
            gradient.sub_(gradient.mean(-1, keepdim=True))
        if dx.dtype == gradient.dtype:
            torch.addcmul(gradient, normalised, share.unsqueeze(-1), out=dx[block])
        else:
            dx[block].copy_(gradient.addcmul_(normalised, share.unsqueeze(-1)))
    return Gradients(dx, dweight, dbias)


def _gated_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, kept: Kept, form: Form, needs: tuple[bool, ...], gate: Tensor
) -> Gradients:
    rstd, features = kept.rstd, x.shape[1]
    scale = _grouped(_scale(weight, form, x), form)
    dx, dgate = (torch.empty_like(t) if need else None for t, need in ((x, needs[0]), (gate, needs[3])))
    dweight = x.new_zeros(features, dtype=rstd.dtype) if needs[1] else None
    for block in _blocks(x):
        given, gradient, argument = (_grouped(t[block], form).to(rstd.dtype) for t in (x, dy, gate))
        factor = _factor(argument, form)
        entered = given if form.norm_before_gate else given * factor
        normalised = entered * rstd[block].unsqueeze(-1)
        scaled = normalised if scale is None else normalised * scale
        of_factor = gradient * scaled if form.norm_before_gate else given
        if form.norm_before_gate:
            gradient = gradient * factor
        if dweight is not None:
            dweight += (gradient * normalised).sum(0).flatten()
        if dx is None and dgate is None:
            continue
        gradient = gradient if scale is None else gradient * scale
        share = torch.linalg.vecdot(gradient, normalised).div_(given.shape[-1]).unsqueeze(-1)
        gradient = (gradient - normalised * share).mul_(rstd[block].unsqueeze(-1))
        if dgate is not None:
            of_factor = of_factor if form.norm_before_gate else of_factor * gradient
            dgate[block].copy_((of_factor * _slope(argument, form)).flatten(1))
        if dx is not None:
            dx[block].copy_((gradient if form.norm_before_gate else gradient * factor).flatten(1))
    return Gradients(dx, dweight, None, dgate)


def _factor(gate: Tensor, form: Form) -> Tensor:
    return torch.sigmoid(gate) if form.activation == "sigmoid" else F.silu(gate)


def _slope(gate: Tensor, form: Form) -> Tensor:
    """The derivative of the factor."""
    sigmoid = torch.sigmoid(gate)
    slope = sigmoid * (1 - sigmoid)
    return slope if form.activation == "sigmoid" else slope.mul_(gate).add_(sigmoid)


def _grouped(t: Any, form: Form) -> Any:
    """(..., features) as (..., groups, features of one), where there are several; None for None."""
    return t if t is None or form.groups == 1 else t.unflatten(-1, (form.groups, -1))


def _scale(weight: Tensor | None, form: Form, x: Tensor) -> Tensor | None:
    """What the normalised values are multiplied by."""
    if weight is None:
        return None
    wide = weight.to(wide_dtype(x.dtype))
    return form.offset + wide if form.offset else wide


def _blocks(x: Tensor) -> Iterator[slice]:
    rows, features = x.shape[0], x.shape[1:].numel()
    step = max(1, _BLOCK // max(1, features))
    return (slice(row, row + step) for row in range(0, rows, step))
