"""The cases that the choices of a group of projections, and of one large product, distinguish."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.device import product_dtype, triton_serves
from ..tuning.keys import CHECKED_TOKENS, bucket, dtype_name
from .configs import linear_tiles
from .projection import Group

GROUP, LINEAR, RANK = "lora_group", "lora_linear", "lora_rank_products"
_FEWEST_RANKS = 8


class GroupKey(NamedTuple):
    """n projections of one input.

    One mix stands for all: x and the a and b of one adapter a projection are trained, bias and the adapter's own are
    not there, and "four_bit" is NF4 with nested scales in blocks of 64.

    Attributes:
        tokens, ranks: rounded up to powers of two; ranks from 8 on, 0 for a projection without adapters.
        bases: `FrozenWeight.storage` of each.
        compute, lora, out: dtypes of the products and of the results.
        dropout: whether anything is dropped.
    """

    tokens: int
    in_features: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]
    bases: tuple[str, ...]
    compute: str
    lora: str
    out: str
    dropout: bool

    def __str__(self) -> str:
        outs = "+".join(map(str, self.out_features))
        names = dict.fromkeys([*self.bases, self.compute, self.lora, self.out])
        words = [*names, *["dropout"] * self.dropout]
        return f"{self.tokens}x{self.in_features}x{outs}, r={max(self.ranks)}, {', '.join(words)}"

    def at(self, tokens: int, device: torch.device) -> GroupKey:
        compute, lora = (dtype_name(product_dtype(getattr(torch, name), device)) for name in (self.compute, self.lora))
        return self._replace(tokens=bucket(tokens), compute=compute, lora=lora)

    def smaller(self) -> GroupKey:
        return self._replace(tokens=min(self.tokens, CHECKED_TOKENS))


class RankKey(NamedTuple):
    """Products of a matrix (tokens, features) with matrices of rank width; all of one dtype.

    Tokens are rounded up to a power of two, ranks likewise from 8 on.
    """

    tokens: int
    features: int
    rank: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.tokens}x{self.features}, r={self.rank}, {self.dtype}"

    def at(self, tokens: int, device: torch.device) -> RankKey:
        return self._replace(tokens=bucket(tokens))

    def smaller(self) -> RankKey:
        return self._replace(tokens=min(self.tokens, CHECKED_TOKENS))


def rank_key(y: Tensor, rank: int) -> RankKey:
    """The case of y (tokens, features)."""
    return RankKey(bucket(y.shape[0]), y.shape[1], bucket(rank, _FEWEST_RANKS), dtype_name(y.dtype))


def rank_backends(device: torch.device) -> tuple[str, ...]:
    """Candidates for the products of rank width."""
    return ("library", "triton") if triton_serves(device) else ("library",)


class LinearKey(NamedTuple):
    """One large product of our own kernels, in a 16-bit dtype: X W^T forward, dY W for dX.

    One mix stands for all: rank 16, no bias, and nothing that is added to. A rank up to 64 costs the same, and neither
    bias nor sums change what a tile waits for.

    Attributes:
        tokens: rounded up to a power of two.
        in_features: those that are summed over.
        transposed: whether W's rows are not contiguous, as for dX.
    """

    tokens: int
    in_features: int
    out_features: int
    dtype: str
    transposed: bool

    def __str__(self) -> str:
        turned = ", W transposed" * self.transposed
        return f"{self.tokens}x{self.in_features}x{self.out_features}, {self.dtype}{turned}"

    def at(self, tokens: int, device: torch.device) -> LinearKey:
        return self._replace(tokens=bucket(tokens))

    def smaller(self) -> LinearKey:
        return self._replace(tokens=min(self.tokens, CHECKED_TOKENS))


def paths(device: torch.device) -> tuple[str, ...]:
    """Candidates for a whole group, both directions together."""
    return ("library", "triton") if triton_serves(device) else ("library",)


def linear_candidates(device: torch.device) -> tuple[str, ...]:
    """Candidates for one large product of our own path: the library's, and our kernels' tiles."""
    return ("torch", *linear_tiles(device)) if triton_serves(device) else ("torch",)


def linear_cases(key: GroupKey) -> list[tuple[str, LinearKey]]:
    """The large products of a group on our own path, forward and for dX.

    Those of projections of at most a quarter of the widest one's size, as k and v are beside q, are left out: what they
    cost does not pay for their measurement.
    """
    if key.compute not in ("bfloat16", "float16") or key.lora != key.compute:
        return []
    widest = max(key.out_features)
    large = dict.fromkeys(out for out in key.out_features if 4 * out > widest)
    forward = [LinearKey(key.tokens, key.in_features, out, key.compute, False) for out in large]
    dx = [LinearKey(key.tokens, out, key.in_features, key.compute, True) for out in large]
    return [(LINEAR, case) for case in (*forward, *dx)]


def group_key(group: Group, tokens: int) -> GroupKey:
    """The case of a group."""
    projections, dtypes = group.projections, group.dtypes
    weights = [projection.weight for projection in projections]
    shapes = [weight.shape for weight in weights]
    return GroupKey(
        bucket(tokens),
        shapes[0][1],
        tuple([shape[0] for shape in shapes]),
        tuple([bucket(rank, _FEWEST_RANKS) if (rank := projection.rank) else 0 for projection in projections]),
        tuple([weight.storage for weight in weights]),
        dtype_name(dtypes.compute),
        dtype_name(dtypes.lora),
        dtype_name(dtypes.out),
        group.drops,
    )
