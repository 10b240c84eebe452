"""The cases that the choices of a group's products distinguish, their candidates, and what serves unmeasured."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.device import device_capability, triton_serves
from ..tuning.keys import CHECKED_TOKENS, bucket, dtype_name
from .configs import linear_tiles, turns_filled

LINEAR, RANK, MIXED = "lora_linear", "lora_rank_products", "lora_mixed_products"
FIRST_CAPABILITY = 80
"""Of an NVIDIA GPU on which Triton multiplies 16-bit matrices on tensor cores."""
MEASURED_CAPABILITY = 90
"""Of the GPU on which our kernels were measured to be the faster ones."""
MANY_OPERATIONS = 2**39
"""Floating-point operations of a large product, some 0.7 ms of an H200, that a launch of ours should be worth: it costs
the host more than a call of cuBLAS, for its descriptors above all, and with smaller products the GPU would wait."""
MANY_ELEMENTS = 2**26
"""Likewise of a matrix that products of rank width, or the pass of an activation, read: 31 us of an H200."""
WELL_FILLED = 0.9
_FEWEST_RANKS = 8


def kernels_serve(device: torch.device) -> bool:
    """Whether our kernels that multiply matrices run on `device`, in 16-bit dtypes."""
    return (device_capability(device) or 0) >= FIRST_CAPABILITY and triton_serves(device)


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


def rank_key(tokens: int, features: int, rank: int, dtype: torch.dtype) -> RankKey:
    """The case of a matrix (tokens, features)."""
    return RankKey(bucket(tokens), features, bucket(rank, _FEWEST_RANKS), dtype_name(dtype))


def rank_backends(device: torch.device) -> tuple[str, ...]:
    """Candidates for the products of rank width."""
    return ("library", "triton") if kernels_serve(device) else ("library",)


def default_rank_backend(device: torch.device, tokens: int, features: int, rank: int, drops: bool) -> str:
    """What computes the products of rank width where nothing was measured, on a device that our kernels serve.

    Measured on an H200, 8192 x 4096, r = 16, bf16, in microseconds, ours and cuBLAS: X A^T 27 and 27, dS^T X 29 and 28,
    dY B and dY^T S together 39 and 50. Beyond rank 16 those two read dY twice, and cuBLAS is the faster one; of 1024
    features in place of 4096 too. With dropout it needs a dropped copy first; yet a step of two layers of 4096 features
    took 35 ms where the assembler let it serve, and 40 with an assembler that let ours.
    """
    large = tokens * features >= MANY_ELEMENTS
    ours = device_capability(device) == MEASURED_CAPABILITY and large and rank <= 16 and not drops
    return "triton" if ours else "library"


class MixedKey(NamedTuple):
    """The products of a mixed batch: those of `RankKey`, and the update, of which each row reads its own matrices.

    Attributes:
        tokens, features, rank, dtype: as there.
        rows: of the batch, rounded up to a power of two.
    """

    tokens: int
    features: int
    rank: int
    dtype: str
    rows: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.features}, r={self.rank}, {self.dtype}, {self.rows} rows"

    def at(self, tokens: int, device: torch.device) -> MixedKey:
        return self._replace(tokens=bucket(tokens), rows=min(self.rows, bucket(tokens)))

    def smaller(self) -> MixedKey:
        tokens = min(self.tokens, CHECKED_TOKENS)
        return self._replace(tokens=tokens, rows=min(self.rows, tokens))


def mixed_key(tokens: int, features: int, rank: int, dtype: torch.dtype, rows: int) -> MixedKey:
    """The case of a matrix (tokens, features) of so many rows."""
    return MixedKey(*rank_key(tokens, features, rank, dtype), bucket(rows))


class LinearKey(NamedTuple):
    """One large product with its update, in a 16-bit dtype: X W^T forward, dY W for dX.

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


def linear_key(tokens: int, in_features: int, out_features: int, dtype: torch.dtype, transposed: bool) -> LinearKey:
    """The case of a product of so many tokens."""
    return LinearKey(bucket(tokens), in_features, out_features, dtype_name(dtype), transposed)


def linear_candidates(device: torch.device) -> tuple[str, ...]:
    """Candidates for one large product: the library's, and our kernels' tiles."""
    return ("torch", *linear_tiles(device)) if kernels_serve(device) else ("torch",)


def default_linear(tokens: int, out_features: int, in_features: int, device: torch.device) -> str:
    """What computes x w^T where nothing was measured, on a device that our kernels serve.

    Or the sum of such products, of `in_features` together.

    Measured on an H200, 8192 tokens, bf16, in microseconds, ours with the update and cuBLAS without and with one: 4096
    to 14336 features 1223, 1184 and 1274; back 1183, 1182 and 1194; dX of q, k and v 516, 555 and 583. Where the tiles
    fill their last turn badly ours was slower: 4096 tokens, 18944 to 3584 features, 808 for 772.
    """
    if device_capability(device) != MEASURED_CAPABILITY:
        return "torch"
    large = 2 * tokens * out_features * in_features >= MANY_OPERATIONS
    return "triton" if large and turns_filled(tokens, out_features, device) >= WELL_FILLED else "torch"


def default_fused(pre: Tensor) -> str:
    """Whether an MLP's activation of `pre` and its adapters' products are one pass, where nothing was measured."""
    large = pre.numel() >= MANY_ELEMENTS
    return "fused" if device_capability(pre.device) == MEASURED_CAPABILITY and large else "apart"
