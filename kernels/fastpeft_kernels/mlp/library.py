"""The MLP written out forward and backward: the projections by `lora.library`, what lies between them in one pass.

Gate and up lie side by side in one buffer, which is kept for backward. act(gate) * up is made anew there, by the pass
that turns its gradient into those of gate and up: neither it nor the activation alone is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activation import gated_activation, gated_activation_backward
from ..lora import library
from ..lora.projection import Dtypes
from .structure import Mlp

Flags = Sequence[Sequence[bool]]


@dataclass(slots=True, eq=False)
class Kept:
    """What forward leaves for backward.

    Attributes:
        s: x A^T of the inner projections, (tokens, their total rank), or None.
        pre: gate and up, (tokens, width); None where backward reads nothing of them.
        s_down: h A^T of the down projection, (tokens, its rank), or None.
    """

    s: Tensor | None
    pre: Tensor | None
    s_down: Tensor | None


def inner(x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """(pre, s) of x (tokens, in_features); see `Kept`."""
    pre = x.new_empty((x.shape[0], mlp.width), dtype=dtypes.out)
    packed = library.pack(mlp.inner, dtypes.lora)
    return pre, library.forward_into(mlp.columns(pre), x, mlp.inner, packed, dtypes, seeds[:-1], whole=pre)


def forward(x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None]) -> tuple[Tensor, Kept]:
    """The result (tokens, out_features), and what backward wants, for x (tokens, in_features)."""
    pre, s = inner(x, mlp, dtypes, seeds)
    down, packed = [mlp.down], library.pack([mlp.down], dtypes.lora)
    room = library.input_room(x.shape[0], down, packed, dtypes, seeds[-1:]) if dtypes.out == dtypes.compute else None
    h = gated_activation(*mlp.halves(pre), mlp.activation, out=None if room is None else room[:, : mlp.features])
    y = x.new_empty((x.shape[0], mlp.down.weight.shape[0]), dtype=dtypes.out)
    s_down = library.forward_into([y], h, down, packed, dtypes, seeds[-1:], room=room)
    return y, Kept(s, pre, s_down)


def backward(
    dy: Tensor,
    x: Tensor | None,
    kept: Kept,
    mlp: Mlp,
    dtypes: Dtypes,
    seeds: Sequence[Tensor | None],
    dx_dtype: torch.dtype | None,
    needs: Flags,
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """Gradients of x and of `LoraProjection.tensors()` of each of `mlp.projections`.

    Args:
        dy: (tokens, out_features) of dtype `dtypes.out`.
        x: (tokens, in_features); None when no inner adapter's `a` is trained.
        kept, mlp, dtypes, seeds: of forward.
        dx_dtype: dtype of x; None when no gradient of it is wanted.
        needs: which other gradients are wanted.

    Returns:
        (dx, grads), as `lora.library.backward`.
    """
    below = dx_dtype is not None or any(flag for flags in needs[:-1] for flag in flags)
    dh, ds, grads_down = library.backward_without_input(
        kept.s_down,
        [dy],
        [mlp.down],
        library.pack([mlp.down], dtypes.lora),
        dtypes,
        seeds[-1:],
        dtypes.out if below else None,
        needs[-1:],
    )
    trains_a = ds is not None and any(needs[-1][1::3])
    pre, dpre, h = kept.pre, None, None
    if dh is not None:
        assert pre is not None
        h = dh = dh.to(dtypes.out)  # what is made anew takes the place of its gradient
        dpre = torch.empty_like(pre)
        dgate, dup = mlp.halves(dpre)
        gated_activation_backward(dh, *mlp.halves(pre), mlp.activation, dgate=dgate, dup=dup, h=h)
    elif trains_a:
        assert pre is not None
        h = gated_activation(*mlp.halves(pre), mlp.activation)
    if trains_a and ds is not None and h is not None:
        library.down_gradients(ds, h.to(dtypes.lora), [mlp.down], seeds[-1:], needs[-1:], grads_down)
    if dpre is None:
        nothing: list[list[Tensor | None]] = [[None] * len(flags) for flags in needs[:-1]]
        return None, [*nothing, *grads_down]
    packed = library.pack(mlp.inner, dtypes.lora)
    dx, grads = library.backward(
        x, kept.s, mlp.columns(dpre), mlp.inner, packed, dtypes, seeds[:-1], dx_dtype, needs[:-1], whole=dpre
    )
    return dx, [*grads, *grads_down]
