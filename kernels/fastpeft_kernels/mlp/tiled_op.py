"""The MLP in tiles as a torch.library op, for torch.compile and selective checkpointing.

Backward reads nothing that it gives: a compiler that recomputes a checkpointed layer drops it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..lora.autograd import in_use
from ..lora.custom_op import no_gradients
from ..lora.layout import flatten_group, unflatten_group
from ..lora.projection import Dtypes, Group
from .custom_op import lora_mlp_backward_op, mlp_of, seed_of
from .structure import Mlp
from .tiled import Tiles


def apply(x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None], tile: int) -> Tensor:
    """The MLP of x (..., in_features), differentiable. Autocast must be off."""
    x = dtypes.cast_once(x)
    whole = flatten_group(Group(mlp.projections, dtypes, seeds[: len(mlp.projections)]))
    return lora_mlp_tiled_op(x, *whole, mlp.activation, tile, mlp.dropout, seed_of(mlp, seeds))  # type: ignore[no-any-return]


@torch.library.custom_op("fastpeft::lora_mlp_tiled", mutates_args=())
def lora_mlp_tiled_op(
    x: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    layout: str,
    activation: str,
    tile: int,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """`Tiles.project` of x (..., in_features).

    Args:
        tensors, numbers, layout: of `flatten_group`, down last.
        activation: the MLP's.
        tile: tokens at a time.
        dropout, seed: the MLP's, and its seed.
    """
    flat = unflatten_group(tensors, numbers, layout)
    mlp = mlp_of(flat, activation, dropout)
    rows = x.reshape(-1, x.shape[-1])
    with in_use(mlp.projections):
        return Tiles(rows, mlp, flat.group.dtypes, [*flat.group.seeds, seed], tile).project(x.shape[:-1])


@lora_mlp_tiled_op.register_fake
def _(
    x: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    layout: str,
    activation: str,
    tile: int,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    group = unflatten_group(tensors, numbers, layout).group
    return x.new_empty((*x.shape[:-1], group.projections[-1].weight.shape[0]), dtype=group.dtypes.out)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, tensors, numbers, layout, activation, tile, dropout, seed = inputs
    ctx.layout, ctx.activation, ctx.tile, ctx.dtype = (numbers, layout), activation, tile, x.dtype
    ctx.dropout = dropout
    ctx.save_for_backward(x, seed, *tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, seed, *tensors = ctx.saved_tensors
    needs_dx, needs = ctx.needs_input_grad[:2]
    dx_dtype, wanted = ctx.dtype if needs_dx else None, list(needs)
    group = (tensors, *ctx.layout, ctx.activation)
    found = iter(lora_mlp_backward_op(dy, x, None, None, None, *group, dx_dtype, wanted, ctx.tile, ctx.dropout, seed))
    dx = next(found) if needs_dx else None
    grads = [next(found) if flag else None for flag in wanted]
    return dx, grads, no_gradients(ctx.layout[0]), None, None, None, None, None


lora_mlp_tiled_op.register_autograd(_backward, setup_context=_setup)
