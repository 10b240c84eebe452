"""The MLP over some tokens at a time: what is as wide as gate and up has never more rows than a tile.

Every token's result is its own, so forward fills one output tile by tile. Backward reads x and dy alone: for each tile
it makes gate and up again, of them the tile's rows of dx, and adds what the tile gives to the parameters' gradients,
in fp32 at the least. Frozen weights are decoded once each way, for all tiles, and all of them lie decoded meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.random import seeds_from
from ..common.shapes import rounds
from ..lora.projection import Dtypes, LoraAdapter, LoraProjection, trains_b
from ..weights import DecodedOnce
from . import library
from .library import Flags, Kept
from .structure import Mlp

Seeds = Sequence[Tensor | None]


class Tile(NamedTuple):
    """Rows of x, and seeds that give them the dropout that they have as rows of x."""

    rows: slice
    seeds: Seeds


def tiles(tokens: int, tile: int, seeds: Seeds, device: torch.device) -> Iterator[Tile]:
    """All of them, the last as short as it must be; one without tokens where there are none."""
    firsts = rounds(range(0, max(tokens, 1), tile), device)
    moved = [
        None if seed is None else seeds_from(seed, torch.arange(0, max(tokens, 1), tile, device=seed.device))
        for seed in seeds
    ]
    for i, first in enumerate(firsts):
        yield Tile(slice(first, first + tile), [None if each is None else each[i] for each in moved])


@dataclass(slots=True, eq=False)
class Tiles:
    """What the result is made of, in place of `library.Middle`.

    Attributes:
        x: (tokens, in_features).
        tile: tokens that are computed at a time.
    """

    x: Tensor
    mlp: Mlp
    dtypes: Dtypes
    seeds: Seeds
    tile: int

    @property
    def projections(self) -> tuple[LoraProjection, ...]:
        return self.mlp.projections

    def project(self, lead: Sequence[int]) -> Tensor:
        """The MLP's result, (*lead, out_features), and no view."""
        tokens = self.x.shape[0]
        if tokens <= self.tile:
            return library.forward(self.x, self.mlp, self.dtypes, self.seeds, lead)
        out_features = self.mlp.down.weight.shape[0]
        y = self.x.new_empty((*lead, out_features), dtype=self.dtypes.out)
        rows, mlp = y.view(tokens, out_features), _decoded_once(self.mlp)
        for part in tiles(tokens, self.tile, self.seeds, self.x.device):
            library.up_to_down(self.x[part.rows], mlp, self.dtypes, part.seeds)[0].project_into(rows[part.rows])
        return y


def backward(
    dy: Tensor, x: Tensor, mlp: Mlp, dtypes: Dtypes, seeds: Seeds, dx_dtype: torch.dtype | None, needs: Flags, tile: int
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """As `library.backward`, from x (tokens, in_features) alone.

    Gradients of parameters are those of the whole within rounding, because they are summed in another order.

    Args:
        tile: tokens at a time.
        dy, x, mlp, dtypes, seeds, dx_dtype, needs: as there.
    """
    mlp = _decoded_once(mlp)
    summing = replace(mlp, inner=tuple(map(_summing, mlp.inner)), down=_summing(mlp.down))
    dx = None if dx_dtype is None else x.new_empty(x.shape, dtype=dx_dtype)
    sums: list[list[Tensor | None]] = [[None] * len(flags) for flags in needs]
    for part in tiles(x.shape[0], tile, seeds, x.device):
        dx_part, grads = _backward_of(dy[part.rows], x[part.rows], mlp, summing, dtypes, part.seeds, dx_dtype, needs)
        if dx is not None and dx_part is not None:
            dx[part.rows].copy_(dx_part)
        _add(sums, grads)
        del dx_part, grads
    return dx, [
        [
            None if grad is None or tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(of_it, projection.tensors(), strict=True)
        ]
        for of_it, projection in zip(sums, mlp.projections, strict=True)
    ]


def _backward_of(
    dy: Tensor,
    x: Tensor,
    mlp: Mlp,
    summing: Mlp,
    dtypes: Dtypes,
    seeds: Seeds,
    dx_dtype: torch.dtype | None,
    needs: Flags,
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """`library.backward` of a tile, with gradients in the dtypes of the parameters of `summing`."""
    group, down = mlp.groups(dtypes, seeds)
    pre, s = library.inner(x, mlp, group)
    s_down = library.middle(pre, mlp, down, seeds).s_down if trains_b(needs[-1]) else None
    return library.backward(dy, Kept(x, s, pre, s_down), summing, dtypes, seeds, dx_dtype, needs, spend=True)


def _add(sums: list[list[Tensor | None]], grads: list[list[Tensor | None]]) -> None:
    for total, found in zip(sums, grads, strict=True):
        for i, grad in enumerate(found):
            before = total[i]
            total[i] = grad if before is None or grad is None else before.add_(grad)


def _decoded_once(mlp: Mlp) -> Mlp:
    def once(projection: LoraProjection) -> LoraProjection:
        return replace(projection, weight=DecodedOnce(projection.weight))

    return replace(mlp, inner=tuple(map(once, mlp.inner)), down=once(mlp.down))


def _summing(projection: LoraProjection) -> LoraProjection:
    """The same with parameters in fp32 at the least, for gradients have their parameter's dtype."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))

    def adapter(each: LoraAdapter) -> LoraAdapter:
        return replace(each, a=wide(each.a), b=wide(each.b), bias=None if each.bias is None else wide(each.bias))

    bias = None if projection.bias is None else wide(projection.bias)
    return replace(projection, bias=bias, adapters=tuple(map(adapter, projection.adapters)))
