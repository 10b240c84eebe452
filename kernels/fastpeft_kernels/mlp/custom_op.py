"""The MLP as torch.library ops, for torch.compile and selective checkpointing: two forward, one backward.

Two as in `autograd`: a compiler that recomputes a checkpointed layer drops the second, of which backward reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..lora import library as lora_library
from ..lora.autograd import in_use
from ..lora.custom_op import empty_gradients, gradients_in_order, no_gradients
from ..lora.layout import FlatGroup, flatten_group, unflatten_group
from ..lora.projection import Dtypes, Group
from . import library, tiled
from .autograd import stand_in
from .library import Kept, Middle
from .structure import Mlp


def apply(x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Sequence[Tensor | None], keep: bool) -> Tensor:
    """The MLP of x (..., in_features), differentiable. Autocast must be off."""
    x = dtypes.cast_once(x)
    of_projections, seed = seeds[: len(mlp.projections)], seed_of(mlp, seeds)
    whole = flatten_group(Group(mlp.projections, dtypes, of_projections, adapter_index=mlp.adapter_index))
    result, h, s_down, *_ = lora_mlp_up_to_down_op(x, *whole, mlp.activation, keep, mlp.dropout, seed)
    down = flatten_group(mlp.groups(dtypes, seeds)[1])
    return lora_mlp_down_op(result, h, s_down, *down)  # type: ignore[no-any-return]


@torch.library.custom_op("fastpeft::lora_mlp_up_to_down", mutates_args=())
def lora_mlp_up_to_down_op(
    x: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    layout: str,
    activation: str,
    keep: bool,
    dropout: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """What stands for the result, h (tokens, features), then s_down, pre and s of `library.Kept`.

    Args:
        x: (..., in_features).
        tensors, numbers, layout: of `flatten_group`, down last.
        activation: the MLP's.
        keep: whether pre is kept for backward.
        dropout, seed: the MLP's, and its seed.
    """
    flat = unflatten_group(tensors, numbers, layout)
    mlp, seeds = mlp_of(flat, activation, dropout), [*flat.group.seeds, seed]
    with in_use(mlp.inner):
        middle, pre, s = library.up_to_down(x.reshape(-1, x.shape[-1]), mlp, flat.group.dtypes, seeds)
    result, _, s_down, _, no_s = _empty(x, flat, activation)
    return [result, middle.h, s_down if middle.s_down is None else middle.s_down, pre, no_s if s is None else s]


@lora_mlp_up_to_down_op.register_fake
def _(
    x: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    layout: str,
    activation: str,
    keep: bool,
    dropout: float,
    seed: Tensor | None,
) -> list[Tensor]:
    return _empty(x, unflatten_group(tensors, numbers, layout), activation)


@torch.library.custom_op("fastpeft::lora_mlp_down", mutates_args=())
def lora_mlp_down_op(
    result: Tensor, h: Tensor, s_down: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float], layout: str
) -> Tensor:
    """The result, in place of what stands for it; tensors, numbers and layout of the down projection alone."""
    group = unflatten_group(tensors, numbers, layout).group
    packed = lora_library.pack(group)
    with in_use(group.projections):
        return Middle(h, None if packed.a is None else s_down, group, packed).project(result.shape[:-1])


@lora_mlp_down_op.register_fake
def _(
    result: Tensor, h: Tensor, s_down: Tensor, tensors: Sequence[Tensor], numbers: Sequence[float], layout: str
) -> Tensor:
    return result.new_empty(result.shape)


@torch.library.custom_op("fastpeft::lora_mlp_backward", mutates_args=())
def lora_mlp_backward_op(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    pre: Tensor | None,
    s_down: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    layout: str,
    activation: str,
    dx_dtype: torch.dtype | None,
    wanted: Sequence[bool],
    tile: int,
    dropout: float,
    seed: Tensor | None,
) -> list[Tensor]:
    """`library.backward`: dx unless dx_dtype is None, then the gradients of the tensors that are wanted, in order.

    With a tile `tiled.backward`, which reads x and none of the other parts of `library.Kept`.
    """
    flat = unflatten_group(tensors, numbers, layout)
    mlp = mlp_of(flat, activation, dropout)
    rows = None if x is None else x.reshape(-1, x.shape[-1])
    dy_rows, asked = dy.reshape(-1, dy.shape[-1]), (mlp, flat.group.dtypes, [*flat.group.seeds, seed])
    with in_use(mlp.projections):
        if tile:
            assert rows is not None
            dx, grads = tiled.backward(dy_rows, rows, *asked, dx_dtype, flat.flags(wanted), tile)
        else:
            dx, grads = library.backward(dy_rows, Kept(rows, s, pre, s_down), *asked, dx_dtype, flat.flags(wanted))
    results = gradients_in_order(flat, grads)
    if dx is not None and dx_dtype is not None:
        results.insert(0, dx.reshape(*dy.shape[:-1], dx.shape[-1]).to(dx_dtype).contiguous())
    return results


@lora_mlp_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    pre: Tensor | None,
    s_down: Tensor | None,
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    layout: str,
    activation: str,
    dx_dtype: torch.dtype | None,
    wanted: Sequence[bool],
    tile: int,
    dropout: float,
    seed: Tensor | None,
) -> list[Tensor]:
    return empty_gradients(dy.shape[:-1], tensors, numbers, layout, dx_dtype, wanted)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    x, tensors, numbers, layout, activation, keep, dropout, seed = inputs
    ctx.layout, ctx.activation, ctx.dtype, ctx.dropout = (numbers, layout), activation, x.dtype, dropout
    flat = unflatten_group(tensors, *ctx.layout)
    needs_dx, *needs = ctx.needs_input_grad[: 1 + len(tensors)]  # flat here, nested in backward
    ctx.read = library.read_by_backward(needs_dx, flat.flags(needs), keep)
    _, _, s_down, pre, s = output
    ctx.save_for_backward(*[t for t, read in zip((x, s, pre, s_down), ctx.read, strict=True) if read], seed, *tensors)


def _backward(ctx: Any, dys: list[Tensor | None]) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    x, s, pre, s_down = (tensors.pop(0) if read else None for read in ctx.read)
    seed, dy, needs = tensors.pop(0), dys[0], ctx.needs_input_grad
    others = (no_gradients(ctx.layout[0]), None, None, None, None, None)
    if dy is None:
        return None, [None] * len(tensors), *others
    dx_dtype = ctx.dtype if needs[0] else None
    found = iter(
        lora_mlp_backward_op(
            dy, x, s, pre, s_down, tensors, *ctx.layout, ctx.activation, dx_dtype, list(needs[1]), 0, ctx.dropout, seed
        )
    )
    dx = None if dx_dtype is None else next(found)
    return dx, [next(found) if flag else None for flag in needs[1]], *others


def _setup_down(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, tensors, numbers, _ = inputs
    ctx.others = [None] * len(tensors), no_gradients(numbers), None


def _backward_down(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return dy, None, None, *ctx.others


lora_mlp_up_to_down_op.register_autograd(_backward, setup_context=_setup)
lora_mlp_down_op.register_autograd(_backward_down, setup_context=_setup_down)


def mlp_of(flat: FlatGroup, activation: str, dropout: float = 0.0) -> Mlp:
    *inner, down = flat.group.projections
    return Mlp(tuple(inner), down, activation, adapter_index=flat.group.adapter_index, dropout=dropout)


def seed_of(mlp: Mlp, seeds: Sequence[Tensor | None]) -> Tensor | None:
    """Of the dropout between the projections, if anything is dropped there."""
    return None if (drawn := mlp.drawn(seeds)) is None else drawn[0]


def _empty(x: Tensor, flat: FlatGroup, activation: str) -> list[Tensor]:
    """The shapes and dtypes of `lora_mlp_up_to_down_op`."""
    mlp, dtypes = mlp_of(flat, activation), flat.group.dtypes
    tokens = prod(x.shape[:-1])
    *ranks, down_rank = flat.group.widths()
    return [
        stand_in(x, mlp, dtypes),
        x.new_empty((tokens, mlp.features), dtype=dtypes.out),
        x.new_empty((tokens, down_rank), dtype=dtypes.lora),
        x.new_empty((tokens, mlp.width), dtype=dtypes.out),
        x.new_empty((tokens, sum(ranks)), dtype=dtypes.lora),
    ]
