"""The adapters within the frozen products, as more columns of both factors.

    [x | S] [W | sB]^T = x W^T + S (sB)^T          the output, written once
    dy [W | sB] = [dy W | dy sB] = [dx | dS]       dy read once

B lies beside W where W is decoded, which costs nothing for weights that must be decoded anyway. A dense weight is
copied for it: two passes over W, in place of one more over each output and over each of its gradients. Siblings stand
below each other, each B in columns of its own and zeros beside it.

For n projections of one input, forward: 1 + n products (1 + 1 where the outputs lie side by side), backward 2n + 2
(n + 3).

Bytes, in elements, for M tokens, K inputs, N outputs: 4NK + 2MK/n here, 3MN apart. So a dense weight is worth copying
from about M = 4/3 K on; the products of rank width that are saved, which run far below the machine's rate, move that
down. On a GPU a ready weight is therefore extended from M = K on: not yet measured.

On a CPU products are bound by arithmetic, and the longer rows cost more than the passes that they save. Measured on an
EPYC with AVX2, one thread, fp32, r = 16, forward and backward, extended / apart, least of 15: dense q/k/v, gate/up and
one alone 1.08, 1.06, 1.02 (M = 1024, K = 768), 1.04 for q/k/v at M = K = 2048; over NF4 1.06, 1.00, 0.99 and 1.005. So
dense weights are not extended there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.scratch import scratch
from .parts import (
    adapter_input_gradient,
    bias_gradients,
    down_projection,
    multiplies_dense,
    rows_contiguous,
    up_gradients,
)
from .projection import Group, LoraProjection, Packed

ALIGNED = 8
"""Rows are a multiple of so many elements, for 16-byte loads of 16-bit elements."""
LARGEST_STACK = 256 << 20
"""Bytes; siblings that need more are decoded and multiplied one after the other, larger dense weights not copied."""
ROOM_FOR_ZEROS = 16
"""The zeros beside each sibling's B may widen the products by one part in so many."""


def fits(group: Group, packed: Packed) -> bool:
    """Whether a group can go this way."""
    projections, dtypes = group.projections, group.dtypes
    if packed.a is None or dtypes.compute != dtypes.lora or packed.a.dtype != dtypes.compute:
        return False
    if not multiplies_dense(group):
        return False
    copied = [p.weight.shape[0] for p in projections if p.weight.is_ready(dtypes.compute)]
    return not copied or max(copied) * packed.a.shape[1] * dtypes.compute.itemsize <= LARGEST_STACK


def pays(projections: Sequence[LoraProjection], a: Tensor, tokens: int) -> bool:
    """Whether this way moves fewer bytes than `apart`; see above."""
    rank, in_features = a.shape
    if ROOM_FOR_ZEROS * (rank - min(projection.rank for projection in projections)) > in_features:
        return False
    if not all(projection.weight.is_ready(a.dtype) for projection in projections):
        return True
    return a.device.type != "cpu" and tokens >= in_features


def input_room(tokens: int, group: Group, packed: Packed) -> Tensor:
    """Room for [x | S], (tokens, width)."""
    assert packed.a is not None
    return packed.a.new_empty((tokens, _width(packed)), dtype=group.dtypes.compute)


def forward_into(
    outputs: Sequence[Tensor],
    x: Tensor,
    group: Group,
    packed: Packed,
    whole: Tensor | None,
    room: Tensor | None,
    s: Tensor | None = None,
) -> Tensor:
    """As `library.forward_into`; S is a tensor of its own."""
    assert packed.a is not None
    compute = group.dtypes.compute
    rank, in_features = packed.a.shape
    if room is None:
        room = input_room(x.shape[0], group, packed)
        room[:, :in_features].copy_(x)
    s = down_projection(room[:, :in_features], group, packed) if s is None else s
    assert s is not None
    room[:, in_features : in_features + rank].copy_(s)
    room[:, in_features + rank :].zero_()
    for y, part in _parts(outputs, whole, group.projections, packed):
        operand = _operand(group.projections, part, packed)
        bias = _bias(group.projections, part, packed, compute)
        base = y if y.dtype == compute else y.new_empty(y.shape, dtype=compute)
        torch.mm(room, operand.t(), out=base) if bias is None else torch.addmm(bias, room, operand.t(), out=base)
        if base is not y:
            y.copy_(base)
    return s


def backward_without_input(
    s: Tensor | None,
    dys: Sequence[Tensor],
    group: Group,
    packed: Packed,
    needs: Sequence[Sequence[bool]],
    whole: Tensor | None,
) -> tuple[Tensor, Tensor, list[list[Tensor | None]]]:
    """As `library.backward_without_input`, for a wanted dx and gradients of every output."""
    assert packed.a is not None
    rank, in_features = packed.a.shape
    grads: list[list[Tensor | None]] = [[None] * len(flags) for flags in needs]
    both = packed.a.new_empty((dys[0].shape[0], _width(packed)))
    for number, (dy, part) in enumerate(_parts(dys, whole, group.projections, packed)):
        dy = rows_contiguous(dy).to(group.dtypes.compute)
        operand = _operand(group.projections, part, packed)
        torch.mm(dy, operand, out=both) if number == 0 else torch.addmm(both, dy, operand, out=both)
    dx, ds = both[:, :in_features], both[:, in_features : in_features + rank]
    column = 0
    for i, projection in enumerate(group.projections):
        first, column = column, column + projection.rank
        dy = rows_contiguous(dys[i])
        bias_gradients(dy, projection, needs[i], grads[i])
        if s is not None and projection.rank:
            up_gradients(dy.to(group.dtypes.lora), s[:, first:column], projection, needs[i], grads[i])
    # Contiguous, as autograd's own would be: what comes before may count on it.
    if not group.drops:
        return torch.addmm(dx, ds, packed.a), ds, grads
    return adapter_input_gradient(ds, packed.a, group, dx.contiguous()), ds, grads


def _width(packed: Packed) -> int:
    assert packed.a is not None
    return -(-sum(packed.a.shape) // ALIGNED) * ALIGNED


def _parts(
    matrices: Sequence[Tensor], whole: Tensor | None, projections: Sequence[LoraProjection], packed: Packed
) -> list[tuple[Tensor, range]]:
    """Each matrix (tokens, columns) with the projections that it belongs to: all at once, or one by one."""
    every = range(len(projections))
    if whole is not None:
        rows = sum(projection.weight.shape[0] for projection in projections)
        assert packed.a is not None
        if rows * _width(packed) * packed.a.element_size() <= LARGEST_STACK:
            return [(whole, every)]
    return [(matrix, range(i, i + 1)) for i, matrix in zip(every, matrices, strict=True)]


def _operand(projections: Sequence[LoraProjection], part: range, packed: Packed) -> Tensor:
    """[W | sB] of some of the projections below each other, (their out_features, width), in a warm buffer."""
    assert packed.a is not None
    in_features = packed.a.shape[1]
    rows = sum(projections[i].weight.shape[0] for i in part)
    operand = scratch((rows, _width(packed)), packed.a.dtype, packed.a.device)
    column = in_features + sum(projection.rank for projection in projections[: part.start])
    row = 0
    for i in part:
        weight, up = projections[i].weight, packed.b[i]
        rows_of_it = operand[row : row + weight.shape[0]]
        row += weight.shape[0]
        target = rows_of_it[:, :in_features]
        if weight.fills:
            weight.decode(out=target)
        else:
            target.copy_(weight.decode(dtype=target.dtype))
        rows_of_it[:, in_features:].zero_()
        if up is not None:
            rows_of_it[:, column : column + up.shape[1]].copy_(up)
            column += up.shape[1]
    return operand


def _bias(projections: Sequence[LoraProjection], part: range, packed: Packed, dtype: torch.dtype) -> Tensor | None:
    """All biases of these projections beside each other, or None where there are none."""
    summed = []
    for i in part:
        own, added = projections[i].bias, packed.bias[i]
        bias = None if own is None else own.detach().to(dtype)
        summed.append(added if bias is None else bias if added is None else bias + added)
    if all(bias is None for bias in summed):
        return None
    sizes = [projections[i].weight.shape[0] for i in part]
    assert packed.a is not None
    filled = [packed.a.new_zeros(n) if b is None else b for n, b in zip(sizes, summed, strict=True)]
    return filled[0] if len(filled) == 1 else torch.cat(filled)
