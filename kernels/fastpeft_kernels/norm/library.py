"""The norms by PyTorch's operations: few passes, a block of rows at a time, in fp32 (fp64 in fp64)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .form import Form, wide_dtype

_BLOCK = 1 << 17  # elements, of which a few copies stay in a processor's second-level cache


class Kept(NamedTuple):
    """What a forward pass leaves for backward: (rows,) each, in fp32 or fp64; mean is None for RMSNorm."""

    rstd: Tensor
    mean: Tensor | None


class Gradients(NamedTuple):
    """Those that were asked for; of weight and bias in fp32, or fp64."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def norm_library(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form) -> tuple[Tensor, Kept]:
    """(y, what backward needs); x: (rows, features), weight and bias: (features,)."""
    scale = _scale(weight, form, x)
    y = torch.empty(x.shape, dtype=form.out, device=x.device)
    rstd = torch.empty((x.shape[0],), dtype=wide_dtype(x.dtype), device=x.device)
    mean = torch.empty_like(rstd) if form.centred else None
    for block in _blocks(x):
        wide = x[block].to(rstd.dtype)
        if mean is not None:
            torch.mean(wide, -1, out=mean[block])
            wide = wide - mean[block].unsqueeze(-1)
        torch.linalg.vecdot(wide, wide, out=rstd[block])
        rstd[block].div_(x.shape[1]).add_(form.eps).rsqrt_()
        target = y[block] if y.dtype == wide.dtype else None
        z = torch.mul(wide, rstd[block].unsqueeze(-1), out=target)
        if form.middle is not None:
            z = z.to(form.middle).to(rstd.dtype)
        if scale is not None:
            z.mul_(scale)
        if bias is not None:
            z.add_(bias)
        if z is not target:
            y[block].copy_(z)
    return y, Kept(rstd, mean)


def norm_backward_library(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    kept: Kept,
    form: Form,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of x, weight and bias as far as `needs` says."""
    rstd, mean = kept
    scale = _scale(weight, form, x)
    dx = torch.empty_like(x) if needs[0] else None
    dweight, dbias = (x.new_zeros(x.shape[1:], dtype=rstd.dtype) if need else None for need in needs[1:])
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


def _scale(weight: Tensor | None, form: Form, x: Tensor) -> Tensor | None:
    """What the normalised values are multiplied by."""
    if weight is None:
        return None
    wide = weight.to(wide_dtype(x.dtype))
    return form.offset + wide if form.offset else wide


def _blocks(x: Tensor) -> Iterator[slice]:
    rows, features = x.shape
    step = max(1, _BLOCK // max(1, features))
    return (slice(row, row + step) for row in range(0, rows, step))
