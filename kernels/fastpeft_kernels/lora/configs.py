"""Tile shapes of the LoRA kernels: an analytic default for each kind of device and dtype, and a few to tune over.

Those of sm_90 were chosen by measurements on an H200, the others by arithmetic. They fit shared memory (99 KiB a block
on sm_86, sm_89 and sm_120, 163 on sm_80, 227 on sm_90 and sm_100) and registers; `aot.py` has each compiled for every
target. fp32 runs in the interpreter only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch

from ..common.device import device_capability


@dataclass(frozen=True, slots=True)
class Config:
    """Tile of one program.

    Attributes:
        block_m: tokens.
        block_n: features, of those that are not summed over.
        block_k: features summed over at a time.
        block_r: most ranks at a time; a power of two, at least 16.
        num_warps, num_stages: launch options.
        tma: loads through tensor descriptors: sm_90 and later, one 16-bit dtype, rows at multiples of 16 bytes.
        group_m: blocks of tokens whose tiles are taken together, for the second-level cache.
        persistent: a program takes tile after tile, as many programs as multiprocessors; with tma only.
        parts: column parts in which a tile is stored, a power of two; with tma only.
    """

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int = 4
    num_stages: int = 3
    tma: bool = False
    group_m: int = 8
    persistent: bool = False
    parts: int = 1

    @property
    def label(self) -> str:
        """Such as "128x256x64 8w 4s", and for tensor descriptors "128x256x64 8w 4s tma g16 persistent"."""
        blocks = "x".join(str(n) for n in (self.block_m, self.block_n, self.block_k) if n)
        descriptors = f" tma g{self.group_m}" * self.tma + " persistent" * self.persistent
        return f"{blocks} {self.num_warps}w {self.num_stages}s{descriptors}"

    def ranks(self, rank: int) -> int:
        """Ranks at a time where `rank` are needed."""
        return min(self.block_r, max(16, 1 << (rank - 1).bit_length()))


TINY = Config(32, 32, 16, 16)  # for the interpreter
LINEAR_TMA = (
    Config(128, 256, 64, 64, 8, 4, tma=True, group_m=8, persistent=True, parts=4),
    Config(128, 256, 64, 64, 8, 4, tma=True, group_m=16, persistent=True, parts=4),
    Config(128, 256, 64, 64, 8, 3, tma=True, group_m=8, persistent=True, parts=2),
    Config(128, 128, 64, 64, 4, 3, tma=True, group_m=8),
)
LINEAR = (Config(128, 128, 64, 64, 8, 3), Config(128, 256, 64, 64, 8, 3))
DOWN = (Config(32, 0, 128, 64, 4, 4), Config(64, 0, 64, 64, 4, 4))
UP = (Config(32, 256, 0, 16, 4, 4), Config(64, 128, 0, 16))
WEIGHT = (Config(64, 128, 0, 64), Config(64, 128, 0, 64, 8))
INPUT = (Config(64, 128, 0, 64, 8), Config(128, 128, 0, 64, 8))

_LARGE_SHARED = (90, 100)


def default_config(choices: tuple[Config, ...], device: torch.device) -> Config:
    """The analytic default among `choices`: the first. On a CPU, in the interpreter, small tiles of the same kind."""
    return TINY if device.type == "cpu" else choices[0]


def linear_config(device: torch.device, dtype: torch.dtype, describable: bool) -> Config:
    """The default of the large product; `describable`: whether its operands can have tensor descriptors."""
    if dtype == torch.float32:  # in the interpreter only
        return TINY
    if describable and device_capability(device) in _LARGE_SHARED:
        return LINEAR_TMA[0]
    return default_config(LINEAR, device)


def linear_tiles(device: torch.device) -> dict[str, Config]:
    """The tiles of 16-bit products to choose among on a GPU, by the names that files of measured choices keep.

    The first, "triton", is the default where operands are aligned.
    """
    tiles = LINEAR_TMA if device_capability(device) in _LARGE_SHARED else LINEAR
    return {"triton": tiles[0], **{f"triton {config.label}": config for config in tiles[1:]}}


def turns_filled(tokens: int, features: int, device: torch.device) -> float:
    """The part of the multiprocessors' turns in which the default tile of large products has work, at most 1."""
    tiles = ceil(tokens / LINEAR_TMA[0].block_m) * ceil(features / LINEAR_TMA[0].block_n)
    count = multiprocessors(device)
    return tiles / (ceil(tiles / count) * count)


def tma_stages(config: Config, out_bytes: int) -> int:
    """Stages of a tile whose results have so many bytes: one less for a persistent program that stores 4-byte ones.

    Its loads stay in shared memory beside what is stored.
    """
    return config.num_stages - (config.persistent and out_bytes > 2)


def token_splits(tokens: int, blocks: int, block_m: int, device: torch.device) -> tuple[int, int]:
    """(splits, tokens of each) so that `blocks` programs a split fill the device about twice.

    Depends on shapes and the device alone, so that the partial sums are the same every time.
    """
    wanted = ceil(2 * multiprocessors(device) / max(blocks, 1))
    splits = max(1, min(wanted, ceil(tokens / block_m), 64))
    each = ceil(ceil(tokens / splits) / block_m) * block_m
    return ceil(tokens / each), each


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 4 for Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
