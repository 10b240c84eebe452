"""DoRA: each output of a projection times its gain, magnitude / norm of the adapted weight's row.

With T = W + scaling B A, norm the norms of T's rows, constant for autograd, and gain = magnitude / norm:

    y = gain * z + bias,    z = x W^T + scaling (x A^T) B^T

and where PEFT drops elements, z is of dropout(x) throughout, and what W makes of the rest has no gain:

    y = gain * z + (x - dropout(x)) W^T + bias

Backward reads z, which is kept where the magnitude is trained, so that no frozen product is made again for its
gradient. PEFT keeps the results of W and of B apart: twice as much, and with dropout W decoded.

T is never whole in memory. The published way (Scaling DoRA, arXiv:2603.22276) does not make it at all, from
|W|^2 + 2 s (W A^T) . B + s^2 B (A A^T) . B, row by row: it needs |W|^2 kept beside each weight, and loses all digits
where B A takes away from W. T's rows by blocks cost about as much and lose none. Measured on an EPYC with AVX2, one
thread, fp32, r = 16, least of 9, 2048 to 2048 features: 5.7 ms by blocks, 4.2 by the other, 79 for x W^T of 512 tokens.

Source: DoRA, Liu et al. 2024, arXiv:2402.09353, with the norm detached as in its section 4.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.device import triton_serves
from ..common.random import TRITON_DTYPES, dropout
from . import keys
from .linear import large_product
from .parts import decoded
from .projection import Dtypes, Group, LoraProjection
from .rank_products import input_gradient, project_down

_BLOCK = {"cpu": 1 << 18}
"""Elements worked on at a time, so that they stay in a CPU's cache; elsewhere `_MANY`."""
_MANY = 1 << 23


class Kept(NamedTuple):
    """What forward leaves for the backward of one projection with a magnitude.

    Attributes:
        z: (tokens, out_features), as above; None where the magnitude is not trained.
        norm: (out_features,), fp32 or fp64.
    """

    z: Tensor | None
    norm: Tensor


def read_by_backward(kept: Sequence[Kept | None], needs: Sequence[Sequence[bool]]) -> list[Kept | None]:
    """Without the z of magnitudes that are not trained; needs as for `library.backward`."""
    pairs = zip(kept, needs, strict=True)
    return [part if part is None or flags[-1] else part._replace(z=None) for part, flags in pairs]


def flat(kept: Sequence[Kept | None]) -> list[Tensor | None]:
    """All tensors, one after the other."""
    return [tensor for part in kept if part is not None for tensor in part]


def unflatten(projections: Sequence[LoraProjection], tensors: Sequence[Tensor | None]) -> list[Kept | None]:
    """What `flat` was given, one for each projection; None for those without magnitude."""
    found = iter(tensors)
    return [None if p.magnitude is None else Kept(next(found), next(found)) for p in projections]  # type: ignore[arg-type]


def without_bias(projection: LoraProjection) -> LoraProjection:
    """Of which z is the result."""
    return projection if projection.bias is None else replace(projection, bias=None)


def before_gain(
    y: Tensor, inputs: Tensor, i: int, group: Group, a: Tensor, s: Tensor, keeps: bool
) -> tuple[Tensor, Tensor]:
    """Room for z, which is y itself unless z is kept or wider; and of which inputs it is the product.

    Args:
        y: room for the result of projection i, (tokens, out_features).
        inputs: x in the dtype of the frozen products.
        a: as for `row_norms`.
        s: the projection's S, (tokens, rank); filled where something is dropped.
    """
    dtype, mask = dtype_of_z(group.dtypes), group.mask(i)
    z = y.new_empty(y.shape, dtype=dtype) if keeps or y.dtype != dtype else y
    if mask is None:
        return z, inputs
    seen = dropout(inputs.to(group.dtypes.lora), *mask)  # the adapter's share is not rounded where it is the wider one
    project_down(seen, a.t(), s, None, group.backend)
    return z, seen.to(inputs.dtype)


def apply_gain(
    y: Tensor,
    z: Tensor,
    inputs: Tensor,
    seen: Tensor,
    i: int,
    group: Group,
    w: Tensor | None,
    up: Tensor,
    a: Tensor,
) -> Kept:
    """Fills y from z, which may be y; seen may be written over where it is not inputs.

    Args:
        y, z, inputs, seen, i, group: of `before_gain`, z filled.
        w: the projection's decoded weight; None where it is yet to be decoded.
        up, a: as for `row_norms`.
    """
    projection, compute = group.projections[i], group.dtypes.compute
    assert projection.magnitude is not None
    w = decoded(projection.weight, compute) if w is None else w
    norm = row_norms(w, up, a)
    bias = None if projection.bias is None else projection.bias.detach().to(compute)
    scale_outputs(z, gain_of(projection.magnitude, norm), bias, y)
    if seen is not inputs:
        rest = torch.sub(inputs, seen, out=seen)
        if y.dtype == compute:
            large_product(rest, w, None, None, out=y, accumulate=True, backend=group.backend)
        else:
            y.add_(torch.mm(rest, w.t()))
    return Kept(z, norm)


def magnitude_gradient(
    dy: Tensor, held: Kept, i: int, group: Group, needs_dx: bool, needs: Sequence[bool], grads: list[Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """The gain, and what goes through W to dx: the gradient of z; with dropout what it has more than dy.

    Args:
        dy: (tokens, out_features), of projection i.
        held: of forward.
        needs, grads: as for `library.backward`, of this projection; the last is filled.
    """
    magnitude = group.projections[i].magnitude
    assert magnitude is not None
    gain = gain_of(magnitude, held.norm)
    dz = dy.new_empty(dy.shape, dtype=group.dtypes.compute) if needs_dx else None
    factor = gain if group.mask(i) is None else gain - 1.0
    total = gain_backward(dy, held.z if needs[-1] else None, factor, dz)
    if total is not None:
        grads[-1] = (total / held.norm).to(magnitude.dtype)
    return gain, dz


def add_dropped_gradient(dx: Tensor | None, dz: Tensor, ds: Tensor, a: Tensor, i: int, group: Group) -> Tensor:
    """dx + dropout(dz W + ds a), in dx where that is wide enough.

    Args:
        dx: (tokens, in_features), what W makes of dy.
        dz: (tokens, out_features), of `magnitude_gradient`.
        ds, a: of projection i, (tokens, rank) and (rank, in_features).
    """
    weight, mask = group.projections[i].weight, group.mask(i)
    assert dx is not None and mask is not None
    own = weight.linear_t(dz)
    part = torch.mm(dz, decoded(weight, group.dtypes.compute)) if own is None else own
    part = dropout(input_gradient(ds, a, part, None, group.backend), *mask)
    return dx.to(torch.promote_types(dx.dtype, part.dtype)).add_(part)


def row_norms(w: Tensor, up: Tensor, a: Tensor) -> Tensor:
    """Norms of the rows of w + up a.

    Args:
        w: (out_features, in_features), floating.
        up, a: scaling * B (out_features, rank), and A (rank, in_features), of one dtype.

    Returns:
        (out_features,), fp32 at least.
    """
    dtype = wide(a.dtype)
    if keys.kernels_serve(w.device) and {w.dtype, a.dtype}.issubset(TRITON_DTYPES):
        from .dora_triton import row_norms_triton

        return row_norms_triton(w, up, a)
    norms = w.new_empty(w.shape[0], dtype=dtype)
    up, a = up.to(dtype), a.to(dtype)
    room: Tensor | None = None
    for rows in _row_blocks(w):
        part, room = _part(room, w[rows], dtype)
        if w.dtype == dtype:
            torch.addmm(w[rows], up[rows], a, out=part)
        else:
            torch.addmm(part.copy_(w[rows]), up[rows], a, out=part)
        torch.linalg.vector_norm(part, dim=1, out=norms[rows])
    return norms


def gain_of(magnitude: Tensor, norm: Tensor) -> Tensor:
    """(out_features,) in the norm's dtype."""
    return magnitude.detach().to(norm.dtype) / norm


def scale_outputs(z: Tensor, gain: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out[:] = gain * z + bias, in the gain's dtype; z and out (tokens, out_features), maybe the same."""
    if z.is_cuda:  # one pass that casts what it reads and writes
        torch.mul(z, gain, out=out) if bias is None else torch.addcmul(bias, z, gain, out=out)
        return
    for rows in _row_blocks(z):
        if z.dtype == out.dtype == gain.dtype:
            torch.mul(z[rows], gain, out=out[rows])
            part = out[rows]
        else:
            part = z[rows] * gain
        if bias is not None:
            part.add_(bias)
        if part.data_ptr() != out[rows].data_ptr():
            out[rows].copy_(part)


def gain_backward(dy: Tensor, z: Tensor | None, gain: Tensor, dz: Tensor | None) -> Tensor | None:
    """dz[:] = gain * dy, and the gain's gradient, each from one read of dy.

    Args:
        dy: (tokens, out_features), floating.
        z: likewise; None where no gradient is wanted.
        gain: (out_features,), fp32 at least.
        dz: (tokens, out_features) to fill, any floating dtype, or None.

    Returns:
        The sum over the tokens of dy * z, (out_features,) in the gain's dtype, or None.
    """
    given = [t for t in (z, dz) if t is not None]
    if given and triton_serves(dy.device) and {t.dtype for t in (dy, gain, *given)}.issubset(TRITON_DTYPES):
        from .dora_triton import gain_backward_triton

        return gain_backward_triton(dy, z, gain, dz)
    total = None if z is None else torch.zeros_like(gain)
    room: Tensor | None = None
    for rows in _row_blocks(dy):
        part, room = _part(room, dy[rows], gain.dtype)
        if z is not None and total is not None:
            total += _times(dy[rows], z[rows], part).sum(0)
        if dz is not None and dz.dtype == gain.dtype:
            _times(dy[rows], gain, dz[rows])
        elif dz is not None:
            dz[rows].copy_(_times(dy[rows], gain, part))
    return total


def scale_rows(tensor: Tensor, gain: Tensor) -> Tensor:
    """gain * tensor (out_features, any), in the tensor's dtype."""
    return (tensor * gain[:, None]).to(tensor.dtype)


def dtype_of_z(dtypes: Dtypes) -> torch.dtype:
    """The adapters', where that is wider than the result's: their part of z may be the larger one."""
    return torch.promote_types(dtypes.lora, dtypes.out)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of the norms for adapters of that dtype."""
    return torch.promote_types(dtype, torch.float32)


def _times(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a * b in out's dtype; torch would make copies of its own to cast."""
    return torch.mul(a, b, out=out) if a.dtype == b.dtype == out.dtype else out.copy_(a).mul_(b)


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    rows, columns = matrix.shape
    step = max(16, _BLOCK.get(matrix.device.type, _MANY) // max(columns, 1))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _part(room: Tensor | None, like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory for a block of that shape, and all of it, to be given again for the next block, which is no larger."""
    if room is None:
        room = torch.empty(like.shape, dtype=dtype, device=like.device)
    return room[: like.shape[0]], room
