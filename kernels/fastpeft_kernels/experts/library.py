"""Expert projections and a layer's experts written out forward and backward, over rows sorted by expert.

No matrix of all experts is made but those of rank width: a base is multiplied where it lies, or decoded one expert at a
time, and only for experts that got rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..activation.library import pieces, wide
from ..common.device import product_dtype
from .products import multiply, outer, transposed
from .routing import Pairs, Routes
from .structure import ExpertAdapter, ExpertProjection, Experts

Flags = Sequence[bool]
Gradients = list[Tensor | None]


class Packed(NamedTuple):
    """A projection's adapters as the products take them, side by side.

    Attributes:
        a: (experts, total rank, in_features).
        b: scaling * B, (experts, out_features, total rank).
    """

    a: Tensor
    b: Tensor


class Kept(NamedTuple):
    """What forward leaves for backward; None where `read_by_backward` says so.

    Attributes:
        x: (tokens, in_features).
        s: x A^T of each row for the inner projection, (rows, its rank).
        pre: what the inner projection gave, (rows, width).
        s_down: h A^T for the down projection, (rows, its rank).
    """

    x: Tensor | None
    s: Tensor | None
    pre: Tensor | None
    s_down: Tensor | None


class Middle(NamedTuple):
    """What the down projection is made of.

    Attributes:
        h: what the activation gave, (rows, features).
        s: as `Kept.s_down`.
        packed, projection: the down projection's.
    """

    h: Tensor
    s: Tensor | None
    packed: Packed | None
    projection: ExpertProjection


def pack(projection: ExpertProjection, dtype: torch.dtype) -> Packed | None:
    if not projection.adapters:
        return None
    adapters, rank, device = projection.adapters, projection.rank, projection.weight.device
    b = torch.empty((projection.experts, projection.out_features, rank), dtype=dtype, device=device)
    for part, adapter in zip(_by_adapter(b, adapters, 2), adapters, strict=True):
        part.copy_(adapter.b * adapter.scaling)
    return Packed(torch.cat([adapter.a.to(dtype) for adapter in adapters], 1).contiguous(), b)


def project(
    x: Tensor, projection: ExpertProjection, packed: Packed | None, routes: Routes
) -> tuple[Tensor, Tensor | None]:
    """(y, S): the projection of x (rows, in_features) in x's dtype, and x A^T (rows, total rank)."""
    s = rank_product(x, projection, packed, routes)
    return finish_projection(x, s, projection, packed, routes), s


def rank_product(x: Tensor, projection: ExpertProjection, packed: Packed | None, routes: Routes) -> Tensor | None:
    """S = x A^T, (rows, total rank); None without adapters."""
    return None if packed is None else multiply(x, packed.a, projection.rank, routes)


def finish_projection(
    x: Tensor, s: Tensor | None, projection: ExpertProjection, packed: Packed | None, routes: Routes
) -> Tensor:
    """The projection of x of which S is made."""
    y = multiply(x, projection.matrices(x.dtype), projection.out_features, routes)
    if packed is not None and s is not None:
        multiply(s, packed.b, projection.out_features, routes, add_to=y)
    if projection.bias is not None:
        y += projection.bias.to(y.dtype)[routes.experts]
    return y


def input_gradient(
    dy: Tensor, projection: ExpertProjection, packed: Packed | None, routes: Routes, wanted: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dS) for dy (rows, out_features); dx None unless `wanted`."""
    dx, ds = None, None
    if wanted:
        dx = multiply(dy, transposed(projection.matrices(dy.dtype)), projection.in_features, routes)
    if packed is not None:
        ds = multiply(dy, packed.b.mT, projection.rank, routes)
        if dx is not None:
            multiply(ds, packed.a.mT, projection.in_features, routes, add_to=dx)
    return dx, ds


def adapter_gradients(
    projection: ExpertProjection, routes: Routes, down: tuple[Tensor, Tensor] | None, up: tuple[Tensor, Tensor] | None
) -> Gradients:
    """Gradients of `projection.tensors()`.

    Args:
        down: (dS, x), of which that of A is made; None where no A is trained.
        up: (dy, S), of which that of B is made; None where no B is trained.
    """
    adapters = projection.adapters
    da = [None] * len(adapters) if down is None else _by_adapter(outer(*down, projection.experts, routes), adapters, 1)
    db = [None] * len(adapters) if up is None else _by_adapter(outer(*up, projection.experts, routes), adapters, 2)
    found: Gradients = []
    for adapter, a, b in zip(adapters, da, db, strict=True):
        found.append(None if a is None else a.to(adapter.a.dtype))
        found.append(None if b is None else (b * adapter.scaling).to(adapter.b.dtype))
    return found


def read_by_backward(experts: Experts, needs: Flags) -> tuple[bool, bool, bool, bool]:
    """Which parts of `Kept` backward reads, in order; `needs` as of `backward`."""
    (needs_x, needs_weights), inner, down = _split(experts, needs)
    pre = needs_x or needs_weights or any(inner) or any(down[::2])
    return any(inner[::2]), any(inner[1::2]), pre, any(down[1::2])


def up_to_down(x: Tensor, pairs: Pairs, experts: Experts, dtype: torch.dtype) -> tuple[Middle, Kept]:
    """All of forward but the down projection itself, for x (tokens, in_features), with products in `dtype`."""
    product, routes = product_dtype(dtype, x.device), pairs.routes
    pre, s = project(pairs.gather(x).to(product), experts.inner, pack(experts.inner, product), routes)
    pre = pre.to(dtype)
    h, packed = experts.gating.forward(pre).to(product), pack(experts.down, product)
    s_down = rank_product(h, experts.down, packed, routes)
    return Middle(h, s_down, packed, experts.down), Kept(x, s, pre, s_down)


def down(middle: Middle, pairs: Pairs, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The experts' weighted sum, (tokens, out_features) in `dtype`."""
    y = finish_projection(middle.h, middle.s, middle.projection, middle.packed, pairs.routes)
    return pairs.sum(y * _sorted(weights, pairs)).to(dtype)


def backward(
    dy: Tensor,
    kept: Kept,
    pairs: Pairs,
    weights: Tensor,
    experts: Experts,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    needs: Flags,
    spend: bool = False,
) -> tuple[Tensor | None, Tensor | None, Gradients]:
    """(dx, dweights, gradients of `tensors()` of inner and down), None where `needs`, in that order, is False.

    The gradient of a token's weight is the product of dy with what the expert gave. That is not kept: it is
    h . (dy W + dS A) + dy . bias, of which the bracket is made for the gradient of h anyway. With `spend`, `kept.pre`
    may be written over: nobody reads it again.
    """
    (needs_x, needs_weights), flags, flags_down = _split(experts, needs)
    inner, down, routes = experts.inner, experts.down, pairs.routes
    product = product_dtype(dtype, dy.device)
    scale = _sorted(weights, pairs)
    rows = pairs.gather(dy).to(product)
    below = needs_x or needs_weights or any(flags)
    dh, ds = input_gradient(rows, down, pack(down, product), routes, below)
    pre, dpre, h = kept.pre, None, None
    if dh is not None:
        assert pre is not None
        h, dpre = (dh * scale).to(dtype), pre if spend else torch.empty_like(pre)
        experts.gating.backward(h, pre, dpre)  # fills h too
    elif any(flags_down[::2]):
        assert pre is not None
        h = experts.gating.forward(pre)
    h = None if h is None else h.to(product)
    dweights = None
    if needs_weights:
        assert dh is not None and h is not None
        dweights = _dot(dh, h)
        if down.bias is not None:
            dweights += _dot(rows, down.bias.to(product)[routes.experts])
        dweights = torch.empty_like(dweights).index_copy_(0, pairs.order, dweights).view(pairs.shape).to(weights.dtype)
    of_down = adapter_gradients(
        down,
        routes,
        ((ds * scale).to(product), h) if ds is not None and h is not None and any(flags_down[::2]) else None,
        (rows, (kept.s_down * scale).to(product)) if kept.s_down is not None else None,
    )
    del rows, dh, h
    if dpre is None or not (needs_x or any(flags)):
        return None, dweights, [*[None] * len(flags), *of_down]
    dpre = dpre.to(product)
    dx, ds = input_gradient(dpre, inner, pack(inner, product), routes, needs_x)
    of_inner = adapter_gradients(
        inner,
        routes,
        (ds, pairs.gather(kept.x).to(product)) if ds is not None and kept.x is not None else None,
        (dpre, kept.s) if kept.s is not None else None,
    )
    return None if dx is None else pairs.sum(dx).to(x_dtype), dweights, [*of_inner, *of_down]


def _by_adapter(packed: Tensor, adapters: Sequence[ExpertAdapter], dim: int) -> Sequence[Tensor]:
    return packed.split([adapter.rank for adapter in adapters], dim)


def _split(experts: Experts, needs: Flags) -> tuple[tuple[bool, bool], Flags, Flags]:
    """Flags of x and the weights, of the inner projection's tensors, and of the down projection's."""
    middle = 2 + 2 * len(experts.inner.adapters)
    return (needs[0], needs[1]), needs[2:middle], needs[middle:]


def _sorted(weights: Tensor, pairs: Pairs) -> Tensor:
    """(rows, 1)."""
    return weights.reshape(-1)[pairs.order].unsqueeze(1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(rows,), of each row; in fp32 (fp64 in fp64)."""
    return torch.cat([(wide(a[piece]) * wide(b[piece])).sum(1) for piece in pieces(a)] or [wide(a[:0].sum(1))])
