"""The experts' ops for autograd: nodes that keep what backward reads, and no matrix of an expert.

A layer's experts are two nodes, for the reason given in `mlp.autograd`: the second saves nothing, so that activation
checkpointing that is not reentrant need not run the down projection again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..common.device import product_dtype
from ..lora.autograd import in_use
from ..mlp.autograd import graph_is_kept
from . import library
from .library import Kept, Middle
from .routing import Pairs, Routes
from .structure import ExpertProjection, Experts


class GroupedLoraLinear(torch.autograd.Function):
    """Keeps x, if any A is trained, and S = x A^T, if any B is."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, routes: Routes, projection: ExpertProjection, dtype: torch.dtype, x: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.call = (routes, projection, dtype, x.dtype)
        ctx.stamp = projection.weight.stamp()
        product = product_dtype(dtype, x.device)
        with in_use([projection]):
            y, s = library.project(x.to(product), projection, library.pack(projection, product), routes)
        flags = ctx.needs_input_grad[4:]
        ctx.save_for_backward(x if any(flags[::2]) else None, s if any(flags[1::2]) else None, *projection.read_again())
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        routes, projection, dtype, x_dtype = ctx.call
        x, s, *_ = ctx.saved_tensors
        product = product_dtype(dtype, dy.device)
        with in_use([projection]):
            projection.weight.check_unchanged(ctx.stamp)
            dy, packed = dy.to(product).contiguous(), library.pack(projection, product)
            dx, ds = library.input_gradient(dy, projection, packed, routes, ctx.needs_input_grad[3])
            grads = library.adapter_gradients(
                projection,
                routes,
                (ds, x.to(product)) if x is not None and ds is not None else None,
                (dy, s) if s is not None else None,
            )
        return None, None, None, None if dx is None else dx.to(x_dtype), *grads


class LoraExpertsUpToDown(torch.autograd.Function):
    """Keeps x, what the inner projection gave, S of both, and the routing; h and the outputs are made anew.

    Its output stands for the result: its gradient is the result's. It has the shape and one number of storage.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, pairs: Pairs, experts: Experts, dtype: torch.dtype, x: Tensor, weights: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Middle]:
        ctx.call = (experts, dtype, x.dtype, pairs.shape, pairs.routes.spans)
        ctx.stamps = [projection.weight.stamp() for projection in experts.projections]
        with in_use(experts.projections):
            middle, kept = library.up_to_down(x, pairs, experts, dtype)
        read = library.read_by_backward(experts, ctx.needs_input_grad[3:])
        ctx.save_for_backward(
            *(t if wanted else None for t, wanted in zip(kept, read, strict=True)),
            weights,
            pairs.order,
            pairs.tokens,
            pairs.routes.experts,
            pairs.routes.ends,
            *experts.inner.read_again(),
            *experts.down.read_again(),
            experts.down.bias if ctx.needs_input_grad[4] else None,  # in the gradient of the weights
        )
        return x.new_zeros(()).expand(x.shape[0], experts.down.out_features), middle

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, _: None) -> tuple[Any, ...]:  # type: ignore[no-untyped-def]
        experts, dtype, x_dtype, shape, spans = ctx.call
        x, s, pre, s_down, weights, order, tokens, chosen, ends, *_ = ctx.saved_tensors
        pairs = Pairs(order, tokens, shape, Routes(chosen, ends, spans))
        with in_use(experts.projections):
            for projection, stamp in zip(experts.projections, ctx.stamps, strict=True):
                projection.weight.check_unchanged(stamp)
            dx, dweights, grads = library.backward(
                dy,
                Kept(x, s, pre, s_down),
                pairs,
                weights,
                experts,
                dtype,
                x_dtype,
                ctx.needs_input_grad[3:],
                spend=not graph_is_kept(dy.device),
            )
        return None, None, None, dx, dweights, *grads


class LoraExpertsDown(torch.autograd.Function):
    """The result, in place of what stood for it."""

    @staticmethod
    def forward(ctx, stand_in: Tensor, middle: Middle, pairs: Pairs, weights: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        with in_use([middle.projection]):
            return library.down(middle, pairs, weights, stand_in.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        return dy, None, None, None


def apply(x: Tensor, pairs: Pairs, weights: Tensor, experts: Experts, dtype: torch.dtype) -> Tensor:
    """A layer's experts, differentiable where grad mode and inputs ask for it."""
    tensors = [tensor for projection in experts.projections for tensor in projection.tensors()]
    stand_in, middle = LoraExpertsUpToDown.apply(pairs, experts, dtype, x, weights, *tensors)
    return LoraExpertsDown.apply(stand_in, middle, pairs, weights.detach())  # type: ignore[no-any-return]
