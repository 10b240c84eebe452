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

from ..tuning.choosing import choice
from . import apart, extended
from .keys import BACKWARD, FORWARD, group_key, ways
from .parts import down_gradients, pack
from .projection import Dtypes, LoraProjection, Packed

__all__ = ["backward", "backward_without_input", "down_gradients", "forward", "forward_into", "pack"]


def forward(
    x: Tensor, projections: Sequence[LoraProjection], packed: Packed, dtypes: Dtypes, seeds: Sequence[Tensor | None]
) -> tuple[list[Tensor], Tensor | None]:
    """All outputs and S.

    Args:
        x: (..., in_features), any floating dtype.
        projections, packed, dtypes, seeds: the group; seeds[i] is None where projection i drops nothing.

    Returns:
        (outputs, s): outputs[i] is (..., out_features) and no view; s is (tokens, total rank) or None.
    """
    outputs = [x.new_empty((*x.shape[:-1], p.weight.shape[0]), dtype=dtypes.out) for p in projections]
    rows = [y.view(-1, y.shape[-1]) for y in outputs]
    return outputs, forward_into(rows, x.reshape(-1, x.shape[-1]), projections, packed, dtypes, seeds)


def forward_into(
    outputs: Sequence[Tensor],
    x: Tensor,
    projections: Sequence[LoraProjection],
    packed: Packed,
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
    *,
    whole: Tensor | None = None,
    room: Tensor | None = None,
) -> Tensor | None:
    """`forward` into given memory.

    Args:
        outputs: matrices (tokens, out_features) of dtype `dtypes.out`, columns contiguous.
        x: (tokens, in_features).
        projections, packed, dtypes, seeds: as `forward`.
        whole: the buffer whose columns `outputs` are, side by side, if they are.
        room: from `input_room`, if x lies in its first columns.

    Returns:
        S, (tokens, total rank), or None.
    """
    alone = len(projections) == 1 and room is None and x.dtype == dtypes.compute  # a copy would cost what it saves
    layout = "room" if room is not None else "" if whole is None else "side by side"
    if not _extends(FORWARD, projections, packed, dtypes, x.shape[0], seeds, layout, alone):
        return apart.forward_into(outputs, x, projections, packed, dtypes, seeds)
    return extended.forward_into(outputs, x, projections, packed, dtypes, seeds, whole, room)


def input_room(
    tokens: int,
    projections: Sequence[LoraProjection],
    packed: Packed,
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
) -> Tensor | None:
    """A matrix of dtype `dtypes.compute` with room for x in its first columns, where that saves a copy; else None."""
    if not _extends(FORWARD, projections, packed, dtypes, tokens, seeds, "room"):
        return None
    return extended.input_room(tokens, projections, packed, dtypes)


def backward(
    x: Tensor | None,
    s: Tensor | None,
    dys: Sequence[Tensor | None],
    projections: Sequence[LoraProjection],
    packed: Packed,
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
    dx_dtype: torch.dtype | None,
    needs: Sequence[Sequence[bool]],
    *,
    whole: Tensor | None = None,
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradients of x and of `LoraProjection.tensors()` of each projection.

    Args:
        x: (tokens, in_features) as kept by forward; None when no adapter's `a` is trained.
        s, dys, projections, packed, dtypes, seeds, dx_dtype, needs, whole: as `backward_without_input`.

    Returns:
        (dx, grads): dx (tokens, in_features) in any of the dtypes given, rows maybe apart; grads in the parameters'
        dtypes; None where not wanted.
    """
    dx, ds, grads = backward_without_input(s, dys, projections, packed, dtypes, seeds, dx_dtype, needs, whole=whole)
    if ds is not None and x is not None:
        down_gradients(ds, x.to(dtypes.lora), projections, seeds, needs, grads)
    return dx, grads


def backward_without_input(
    s: Tensor | None,
    dys: Sequence[Tensor | None],
    projections: Sequence[LoraProjection],
    packed: Packed,
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
    dx_dtype: torch.dtype | None,
    needs: Sequence[Sequence[bool]],
    *,
    whole: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, list[list[Tensor | None]]]:
    """All of `backward` that does not read x.

    Args:
        s: (tokens, total rank) as kept by forward; None when no adapter's `b` is trained.
        dys: gradient of each output, (tokens, out_features) of dtype `dtypes.out`, or None where it is zero.
        dx_dtype: dtype of x, whose gradient is summed in it where it is wider than `dtypes.compute`; None when no
            gradient of x is wanted.
        needs: which other gradients are wanted; needs[i] runs parallel to projections[i].tensors().
        whole: the buffer whose columns `dys` are, side by side, if they are.

    Returns:
        (dx, ds, grads): as `backward`, and dS, (tokens, total rank), for `down_gradients`.
    """
    given = [dy for dy in dys if dy is not None]
    sums_apart = len(given) > 1 and whole is None and dx_dtype is not None
    if (
        dx_dtype is None
        or len(given) < len(projections)
        or (sums_apart and torch.promote_types(dx_dtype, dtypes.compute) != dtypes.compute)
        or not _extends(
            BACKWARD, projections, packed, dtypes, given[0].shape[0], seeds, "" if whole is None else "side by side"
        )
    ):
        return apart.backward_without_input(s, dys, projections, packed, dtypes, seeds, dx_dtype, needs)
    return extended.backward_without_input(s, given, projections, packed, dtypes, seeds, needs, whole)


def _extends(
    op: str,
    projections: Sequence[LoraProjection],
    packed: Packed,
    dtypes: Dtypes,
    tokens: int,
    seeds: Sequence[Tensor | None],
    layout: str,
    alone: bool = False,
) -> bool:
    """Whether to go the extended way; `layout` as in GroupKey."""
    if packed.a is None or not extended.fits(projections, packed, dtypes):
        return False
    way = choice(
        op,
        packed.a.device,
        lambda: group_key(projections, dtypes, tokens, seeds, layout),
        ways,
        "extended" if not alone and extended.pays(projections, packed.a, tokens) else "apart",
    )
    return way == "extended"
