"""LoRA projections on the library's matrix products (BLAS, cuBLAS), written out forward and backward.

For n projections of one input: S = x A^T is one product for all adapters and is kept for backward, and dA is one
product for all. A frozen weight is decoded twice, once in forward and once in backward, into a buffer that is used
again. The rest goes one of two ways: `extended` takes the adapters into the frozen products, `apart` gives them
products of their own. Which one was measured here decides, else which one moves fewer bytes. Both keep the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.device import triton_serves
from ..common.random import TRITON_DTYPES
from ..tuning.choosing import choice
from . import apart, extended, parts
from .keys import BACKWARD, FORWARD, group_key, ways
from .parts import down_gradients, down_projection
from .projection import Group, LoraProjection, Packed

__all__ = [
    "backward",
    "backward_without_input",
    "down_gradients",
    "down_projection",
    "forward",
    "forward_into",
    "input_room",
    "pack",
]


def pack(projections: Sequence[LoraProjection], dtype: torch.dtype) -> Packed:
    """Cast, scale and join the adapters, once for the whole group; on a GPU by one launch for each four of them."""
    found = [adapter.a for projection in projections for adapter in projection.adapters]
    if not found or not found[0].is_cuda or not {dtype, *(a.dtype for a in found)}.issubset(TRITON_DTYPES):
        return parts.pack(projections, dtype)
    if not triton_serves(found[0].device):
        return parts.pack(projections, dtype)
    from . import packing

    return packing.pack(projections, dtype)


def forward(x: Tensor, group: Group, packed: Packed) -> tuple[list[Tensor], Tensor | None]:
    """All outputs and S.

    Args:
        x: (..., in_features), any floating dtype.
        group, packed: the projections, and their adapters from `pack`.

    Returns:
        (outputs, s): outputs[i] is (..., out_features) and no view; s is (tokens, total rank) or None.
    """
    outputs = [x.new_empty((*x.shape[:-1], p.weight.shape[0]), dtype=group.dtypes.out) for p in group.projections]
    rows = [y.view(-1, y.shape[-1]) for y in outputs]
    return outputs, forward_into(rows, x.reshape(-1, x.shape[-1]), group, packed)


def forward_into(
    outputs: Sequence[Tensor],
    x: Tensor,
    group: Group,
    packed: Packed,
    *,
    whole: Tensor | None = None,
    room: Tensor | None = None,
    s: Tensor | None = None,
) -> Tensor | None:
    """`forward` into given memory.

    Args:
        outputs: matrices (tokens, out_features) of dtype `group.dtypes.out`, columns contiguous.
        x: (tokens, in_features).
        group, packed: as `forward`.
        whole: the buffer whose columns `outputs` are, side by side, if they are.
        room: from `input_room`, if x lies in its first columns.
        s: S, if `down_projection` has made it already.

    Returns:
        S, (tokens, total rank), or None.
    """
    # A copy of x would cost what it saves.
    alone = len(group.projections) == 1 and room is None and x.dtype == group.dtypes.compute
    layout = "room" if room is not None else "" if whole is None else "side by side"
    if not _extends(FORWARD, group, packed, x.shape[0], layout, alone):
        return apart.forward_into(outputs, x, group, packed, s)
    return extended.forward_into(outputs, x, group, packed, whole, room, s)


def input_room(tokens: int, group: Group, packed: Packed) -> Tensor | None:
    """A matrix with room for x in its first columns, of `group.dtypes.compute`, where that saves a copy; else None."""
    return extended.input_room(tokens, group, packed) if _extends(FORWARD, group, packed, tokens, "room") else None


def backward(
    x: Tensor | None,
    s: Tensor | None,
    dys: Sequence[Tensor | None],
    group: Group,
    packed: Packed,
    dx_dtype: torch.dtype | None,
    needs: Sequence[Sequence[bool]],
    *,
    whole: Tensor | None = None,
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradients of x and of `LoraProjection.tensors()` of each projection.

    Args:
        x: (tokens, in_features) as kept by forward; None when no adapter's `a` is trained.
        s, dys, group, packed, dx_dtype, needs, whole: as `backward_without_input`.

    Returns:
        (dx, grads): dx (tokens, in_features) in any of the dtypes given, rows maybe apart; grads in the parameters'
        dtypes; None where not wanted.
    """
    dx, ds, grads = backward_without_input(s, dys, group, packed, dx_dtype, needs, whole=whole)
    if ds is not None and x is not None:
        down_gradients(ds, x.to(group.dtypes.lora), group, needs, grads)
    return dx, grads


def backward_without_input(
    s: Tensor | None,
    dys: Sequence[Tensor | None],
    group: Group,
    packed: Packed,
    dx_dtype: torch.dtype | None,
    needs: Sequence[Sequence[bool]],
    *,
    whole: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, list[list[Tensor | None]]]:
    """All of `backward` that does not read x.

    Args:
        s: (tokens, total rank) as kept by forward; None when no adapter's `b` is trained.
        dys: gradient of each output, (tokens, out_features) of dtype `group.dtypes.out`, or None where it is zero.
        dx_dtype: dtype of x, whose gradient is summed in it where it is wider than `group.dtypes.compute`; None when no
            gradient of x is wanted.
        needs: which other gradients are wanted; needs[i] runs parallel to `tensors()` of projection i.
        whole: the buffer whose columns `dys` are, side by side, if they are.

    Returns:
        (dx, ds, grads): as `backward`, and dS, (tokens, total rank), for `down_gradients`.
    """
    given = [dy for dy in dys if dy is not None]
    sums_apart = len(given) > 1 and whole is None and dx_dtype is not None
    if (
        dx_dtype is None
        or len(given) < len(group.projections)
        or (sums_apart and torch.promote_types(dx_dtype, group.dtypes.compute) != group.dtypes.compute)
        or not _extends(BACKWARD, group, packed, given[0].shape[0], "" if whole is None else "side by side")
    ):
        return apart.backward_without_input(s, dys, group, packed, dx_dtype, needs)
    return extended.backward_without_input(s, given, group, packed, needs, whole)


def _extends(op: str, group: Group, packed: Packed, tokens: int, layout: str, alone: bool = False) -> bool:
    """Whether to go the extended way; `layout` as in GroupKey."""
    if packed.a is None or not extended.fits(group, packed):
        return False
    pays = not alone and extended.pays(group.projections, packed.a, tokens)
    device, default = packed.a.device, "extended" if pays else "apart"
    return choice(op, device, lambda: group_key(group, tokens, layout), ways, default) == "extended"
