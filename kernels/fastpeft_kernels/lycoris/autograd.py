"""Forward and backward of a frozen projection with LoHa or LoKr updates, as one autograd function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.reshaping import reshaped
from ..lora.autograd import in_use
from ..lora.projection import LoraProjection
from . import hadamard, kronecker
from .adapters import LohaAdapter, LokrAdapter

Adapters = Sequence[LohaAdapter] | Sequence[LokrAdapter]


class LycorisLinear(torch.autograd.Function):
    """Keeps x, where a factor is trained, and the factors themselves; no update, and no sum of it and the weight."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, base: LoraProjection, adapters: Adapters, dtype: torch.dtype, x: Tensor, bias: Tensor | None, *_: Tensor
    ) -> Tensor:
        ctx.of = (base, adapters, dtype)
        ctx.input = (x.shape, x.dtype)
        ctx.stamp = base.weight.stamp()
        y = compute(x, base, adapters, dtype)
        kept = x if x.dtype.itemsize <= dtype.itemsize else x.to(dtype)
        factors = [factor for adapter in adapters for factor in adapter.factors]
        ctx.save_for_backward(kept if any(ctx.needs_input_grad[5:]) else None, *factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        (base, adapters, dtype), (shape, x_dtype) = ctx.of, ctx.input
        x, *factors = ctx.saved_tensors
        needs_dx, needs_bias, *needs = ctx.needs_input_grad[3:]
        rows = dy.reshape(-1, dy.shape[-1]).to(dtype).contiguous()
        with in_use((base,)):
            base.weight.check_unchanged(ctx.stamp)
            dx, grads = _op(adapters).backward(
                rows,
                None if x is None else _rows(x, dtype),
                base.weight,
                cast(adapters, dtype),
                needs_dx,
            )
        grads = grads or [None] * len(factors)
        given = [g.to(f.dtype) if n else None for g, f, n in zip(grads, factors, needs, strict=True)]
        dbias = rows.sum(0).to(base.bias.dtype) if needs_bias else None
        return None, None, None, None if dx is None else dx.view(shape).to(x_dtype), dbias, *given


def apply(x: Tensor, base: LoraProjection, adapters: Adapters, dtype: torch.dtype) -> Tensor:
    """The result (..., out_features) in x's dtype, differentiable where grad mode and the inputs ask for it."""
    factors = [factor for adapter in adapters for factor in adapter.factors]
    return LycorisLinear.apply(base, adapters, dtype, x, base.bias, *factors)  # type: ignore[no-any-return]


def compute(x: Tensor, base: LoraProjection, adapters: Adapters, dtype: torch.dtype) -> Tensor:
    bias = None if base.bias is None else base.bias.to(dtype)
    with in_use((base,)):
        y: Tensor = _op(adapters).forward(_rows(x, dtype), base.weight, bias, cast(adapters, dtype))
    return reshaped(y.to(x.dtype), (*x.shape[:-1], y.shape[-1]))


def cast(adapters: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    return [type(a)(*[factor.detach().to(dtype) for factor in a.factors], a.scaling) for a in adapters]


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).to(dtype).contiguous()


def _op(adapters: Adapters) -> Any:
    return hadamard if isinstance(adapters[0], LohaAdapter) else kronecker
