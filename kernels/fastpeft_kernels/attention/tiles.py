"""Tile sizes of the attention kernels: a few for each size of head and width of dtype, and which to take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..common.aot import SHARED_LIMITS
from ..common.device import device_capability
from .masks import Mask
from .scores import Scores

LARGEST_HEAD = 256
DESCRIBED = range(90, 120)
"""GPUs that read through tensor descriptors. Later ones have them too, but multiply from registers, as sm_80 does, and
of what they read so these are too few: up to 2 KB a thread were spilled of 128 features, and none without."""
_NEEDED = 160_000  # bytes of shared memory, for tiles that are not narrow


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile (powers of two of at least 16), warps and stages of a program, and whether it reads
    through tensor descriptors where it can."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False

    @property
    def label(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.num_warps}x{self.num_stages}{'_tma' * self.tma}"


@dataclass(frozen=True)
class Tiles:
    """One for each kernel; that of `scores`, which gives the gradients of biases, is square."""

    forward: Tile
    keys: Tile
    queries: Tile
    scores: Tile

    @property
    def label(self) -> str:
        return f"forward {self.forward.label}, keys {self.keys.label}, queries {self.queries.label}"


TINY = Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))
"""For Triton's interpreter, whose time goes with the number of elements, wasted ones among them."""

# First the default, on sm_90 measured on an H200. Of a block of the head's features, for 16-bit dtypes: with tensor
# descriptors; without; and where a
# program has 99 KB of shared memory.
_DESCRIBED = {
    64: (
        Tiles(Tile(128, 64, 4, 3, True), Tile(64, 64, 4, 2, True), Tile(64, 64, 4, 3, True), Tile(64, 64, 4, 2)),
        Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3, True), Tile(64, 64, 4, 2, True), Tile(64, 64, 8, 2)),
        Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 1)),
        Tiles(Tile(64, 64, 4, 3), Tile(32, 64, 4, 3, True), Tile(64, 32, 4, 3, True), Tile(32, 32, 4, 2)),
    ),
    128: (
        Tiles(Tile(128, 64, 8, 3), Tile(64, 128, 8, 2, True), Tile(128, 64, 8, 3, True), Tile(64, 64, 4, 2)),
        Tiles(Tile(128, 64, 8, 3, True), Tile(64, 128, 8, 3, True), Tile(128, 64, 8, 4, True), Tile(64, 64, 8, 2)),
        Tiles(Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 1)),
        Tiles(Tile(128, 128, 8, 2, True), Tile(64, 128, 8, 2), Tile(128, 64, 8, 3), Tile(32, 32, 4, 2)),
    ),
    256: (
        Tiles(Tile(128, 64, 8, 2, True), Tile(16, 64, 8, 2, True), Tile(64, 32, 8, 2, True), Tile(32, 32, 4, 1)),
        Tiles(Tile(64, 64, 8, 2), Tile(16, 64, 8, 1), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
    ),
}
_ROOMY = {
    64: (
        Tiles(Tile(128, 64, 8, 3), Tile(32, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)),
        Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    ),
    128: (
        Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 4, 2)),
        Tiles(Tile(128, 64, 8, 3), Tile(16, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    ),
    256: (Tiles(Tile(64, 32, 8, 2), Tile(16, 64, 8, 1), Tile(64, 32, 8, 1), Tile(32, 32, 4, 1)),),
}
_NARROW = {
    64: (Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 1)),),
    128: (Tiles(Tile(128, 32, 8, 2), Tile(16, 64, 4, 1), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1)),),
    256: (Tiles(Tile(64, 32, 8, 1), Tile(16, 64, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),),
}
_ADDED = {  # one thing added to scores, on a GPU with room; the default of 64 features measured on an H200
    64: (
        Tiles(Tile(64, 64, 4, 2, True), Tile(64, 64, 4, 2, True), Tile(64, 64, 4, 2, True), Tile(64, 64, 8, 2)),
        Tiles(Tile(128, 64, 8, 2, True), Tile(64, 128, 8, 2, True), Tile(128, 64, 8, 2, True), Tile(64, 64, 4, 1)),
    ),
    128: (
        Tiles(Tile(128, 64, 8, 2, True), Tile(64, 128, 8, 2, True), Tile(128, 64, 8, 2, True), Tile(64, 64, 8, 2)),
        Tiles(Tile(128, 64, 8, 3, True), Tile(64, 64, 4, 2, True), Tile(64, 64, 4, 2, True), Tile(32, 32, 4, 2)),
    ),
}
_LOADED = {  # for any GPU, where much is done to scores, which takes registers
    64: Tiles(Tile(64, 64, 8, 2, True), Tile(64, 64, 8, 2, True), Tile(64, 64, 8, 2, True), Tile(64, 64, 8, 2)),
    128: Tiles(Tile(64, 32, 8, 2, True), Tile(32, 64, 8, 2, True), Tile(64, 32, 8, 2, True), Tile(32, 32, 4, 2)),
    256: Tiles(Tile(64, 32, 8, 1, True), Tile(16, 32, 4, 1, True), Tile(32, 32, 4, 1, True), Tile(32, 32, 4, 1)),
}
_FP32 = {  # ordinary cores multiply
    64: (Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),),
    128: (Tiles(Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1), Tile(16, 16, 4, 1)),),
    256: (Tiles(Tile(16, 32, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),),
}


def block_of(features: int) -> int:
    """Features of a tile: the next power of two, at least 16. Loads leave out what is not there, products do not."""
    return max(16, 1 << (features - 1).bit_length())


@lru_cache
def tiles_for(capability: int, dtype: torch.dtype, features: int, v_features: int, added: int = 0) -> tuple[Tiles, ...]:
    """Those to choose among on a GPU, the default first.

    Args:
        capability: as `device_capability` gives it.
        dtype, features, v_features: of q, k and v.
        added: how much is done to scores beside what an interval and padding do.
    """
    block = min(max(64, block_of(max(features, v_features))), LARGEST_HEAD)
    if dtype == torch.float32:
        return _FP32[block]
    known = [shared for target, shared in SHARED_LIMITS.items() if target <= capability]
    roomy = bool(known) and known[-1] >= _NEEDED
    if added:
        return _ADDED[block] if added == 1 and roomy and block in _ADDED else (_LOADED[block],)
    if not roomy:
        return _NARROW[block]
    return (_DESCRIBED if capability in DESCRIBED else _ROOMY)[block]


def default_tiles(q: Tensor, v: Tensor, mask: Mask, scores: Scores) -> Tiles:
    """What is taken where nothing is asked for."""
    capability = device_capability(q.device)
    if capability is None:
        return TINY
    parts = (mask.dense, scores.softcap, scores.relative, scores.bias, scores.dropout or None)
    added = sum([part is not None for part in parts])
    return tiles_for(capability, q.dtype, q.shape[-1], v.shape[-1], added)[0]
