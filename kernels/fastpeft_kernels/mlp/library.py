"""The MLP written out forward and backward: the projections by `lora.library`, what lies between them in one pass.

Gate and up lie side by side in one buffer, which is kept for backward. act(gate) * up is made anew there, by the pass
that turns its gradient into those of gate and up: neither it nor the activation alone is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..activation.api import fill_gated_activation, fill_gated_activation_backward
from ..lora import library
from ..lora.frozen_products import large_input_gradient
from ..lora.parts import rows_contiguous
from ..lora.projection import Dtypes, Group, LoraProjection, Packed, trains_a, trains_b
from . import fused
from .structure import Mlp

Flags = Sequence[Sequence[bool]]


class Kept(NamedTuple):
    """What forward leaves for backward; None where `read_by_backward` says so.

    Attributes:
        x: (tokens, in_features).
        s: x A^T of the inner projections, (tokens, their total rank).
        pre: gate and up, (tokens, width).
        s_down: h A^T of the down projection, (tokens, its rank).
    """

    x: Tensor | None
    s: Tensor | None
    pre: Tensor | None
    s_down: Tensor | None


def read_by_backward(needs_dx: bool, needs: Flags, keep: bool) -> tuple[bool, bool, bool, bool]:
    """Which parts of `Kept` backward reads, in order.

    Args:
        needs_dx: whether a gradient of x is wanted.
        needs: which of `LoraProjection.tensors()` of each of `mlp.projections` are trained.
        keep: whether `pre` may be kept; else x is, of which it is made again.
    """
    inner_flags, down_flags = [flag for flags in needs[:-1] for flag in flags], needs[-1]
    inside = needs_dx or any(inner_flags) or trains_a(down_flags)
    reads_x = any(trains_a(flags) for flags in needs[:-1]) or (inside and not keep)
    return reads_x, any(trains_b(flags) for flags in needs[:-1]), inside and keep, trains_b(down_flags)


@dataclass(slots=True, eq=False)
class Middle:
    """What the down projection is made of.

    Attributes:
        h: act(gate) * up, of which elements may be dropped, (tokens, features).
        s_down: as in `Kept`.
        group, packed: the down projection, and its adapters from `lora.library.pack`.
    """

    h: Tensor
    s_down: Tensor | None
    group: Group
    packed: Packed

    @property
    def projections(self) -> Sequence[LoraProjection]:
        """Those that are still to be multiplied by."""
        return self.group.projections

    def project(self, lead: Sequence[int]) -> Tensor:
        """The MLP's result, (*lead, out_features), and no view: whoever gets it may write into it."""
        out_features = self.group.projections[0].weight.shape[0]
        y = self.h.new_empty((*lead, out_features), dtype=self.group.dtypes.out)
        self.project_into(y.view(self.h.shape[0], out_features))
        return y

    def project_into(self, rows: Tensor) -> None:
        """The same into a matrix (tokens, out_features)."""
        library.forward_into([rows], self.h, self.group, self.packed, self.s_down)


def inner(x: Tensor, mlp: Mlp, group: Group) -> tuple[Tensor, Tensor | None]:
    """(pre, s) of x (tokens, in_features) by its projections, of group `group`; see `Kept`."""
    pre = x.new_empty((x.shape[0], mlp.width), dtype=group.dtypes.out)
    return pre, library.forward_into(mlp.columns(pre), x, group, library.pack(group, x.shape[0]))


def up_to_down(
    x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None]
) -> tuple[Middle, Tensor, Tensor | None]:
    """(middle, pre, s): all of forward but the down projection itself, for x (tokens, in_features)."""
    group, down = mlp.groups(dtypes, seeds)
    pre, s = inner(x, mlp, group)
    return middle(pre, mlp, down, seeds), pre, s


def middle(pre: Tensor, mlp: Mlp, down: Group, seeds: Sequence[Tensor | None]) -> Middle:
    """What the down projection, of group `down`, works on: of gate and up, (tokens, width)."""
    packed = library.pack(down, pre.shape[0])
    h = pre.new_empty((pre.shape[0], mlp.features))
    s_down = fused.activation_with_down(pre, mlp, down, packed, h)
    if s_down is None:
        fill_gated_activation(*mlp.halves(pre), mlp.activation, h)
        mlp.drop(h, seeds)
        s_down = library.down_projection(h, down, packed)
    return Middle(h, s_down, down, packed)


def forward(
    x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None], lead: Sequence[int] | None = None
) -> Tensor:
    """The result (..., out_features) for x (..., in_features), or (*lead, out_features), with nothing kept."""
    lead = x.shape[:-1] if lead is None else lead
    return up_to_down(x.reshape(-1, x.shape[-1]), mlp, dtypes, seeds)[0].project(lead)


def backward(
    dy: Tensor,
    kept: Kept,
    mlp: Mlp,
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
    dx_dtype: torch.dtype | None,
    needs: Flags,
    spend: bool = False,
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradients of x and of `LoraProjection.tensors()` of each of `mlp.projections`.

    Args:
        dy: (tokens, out_features) of dtype `dtypes.out`.
        kept, mlp, dtypes, seeds: of forward; without `pre`, gate and up are made again of x.
        dx_dtype: dtype of x; None when no gradient of it is wanted.
        needs: which other gradients are wanted.
        spend: `kept.pre` may be written over, because nobody reads it again: its gradient takes its place.

    Returns:
        (dx, grads), as `lora.library.backward`.
    """
    below = dx_dtype is not None or any(flag for flags in needs[:-1] for flag in flags)
    group, down = mlp.groups(dtypes, seeds)
    packed = library.pack(down, dy.shape[0])
    dh, ds, grads_down = library.backward_without_input(
        kept.s_down, [dy], down, packed, dtypes.out if below else None, needs[-1:]
    )
    reads_h = ds is not None and trains_a(needs[-1])
    pre, dpre, h = kept.pre, None, None
    if pre is None and kept.x is not None and (dh is not None or reads_h):
        pre, _ = inner(kept.x, mlp, group)
        spend = True
    if dh is not None:
        assert pre is not None
        h = dh = mlp.drop(rows_contiguous(dh.to(dtypes.out)), seeds)  # what is made anew takes its gradient's place
        dpre = pre if spend else torch.empty_like(pre)
        packed = library.pack(group, dy.shape[0])
        found = fused.activation_backward(
            dh, pre, dpre, kept.s, ds if reads_h else None, mlp, group, packed, needs, down.drops
        )
        if found is not None:
            del h, dh
            if found.da_down is not None:
                grads_down[0][1] = found.da_down
            dys, dx = mlp.columns(dpre), None
            if dx_dtype is not None:
                dx = large_input_gradient(dys, found.ds, group, packed, dx_dtype)
            if kept.x is not None:
                library.down_gradients(found.ds, kept.x.to(dtypes.lora), group, needs[:-1], found.inner)
            return dx, [*found.inner, *grads_down]
        dgate, dup = mlp.halves(dpre)
        fill_gated_activation_backward(dh, *mlp.halves(pre), mlp.activation, dgate, dup, h)
    elif reads_h:
        assert pre is not None
        h = pre.new_empty((pre.shape[0], mlp.features))
        fill_gated_activation(*mlp.halves(pre), mlp.activation, h)
    if reads_h and ds is not None and h is not None:
        mlp.drop(h, seeds)
        library.down_gradients(ds, h.to(dtypes.lora), down, needs[-1:], grads_down)
    if dpre is None:
        nothing: list[list[Tensor | None]] = [[None] * len(flags) for flags in needs[:-1]]
        return None, [*nothing, *grads_down]
    dx, grads = library.backward(kept.x, kept.s, mlp.columns(dpre), group, packed, dx_dtype, needs[:-1])
    return dx, [*grads, *grads_down]
