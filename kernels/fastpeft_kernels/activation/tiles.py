"""What the Triton launchers of this family share: tile sizes and checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.integers import cdiv, next_power_of_2
from ..common.launching import Launcher

_MAX_PROGRAMS = 2**31 - 1


@dataclass(frozen=True)
class Config:
    """A program's tile of rows and columns (powers of two), and its warps. Fewer columns make more rows of it."""

    block_rows: int
    block_columns: int
    num_warps: int

    def fitted(self, columns: int) -> tuple[int, int]:
        """Rows and columns of the tile for a matrix of so many columns; the number of elements stays."""
        block = min(self.block_columns, next_power_of_2(columns))
        return self.block_rows * self.block_columns // block, block


# First the default: 8 elements a thread, 16 bytes of a 16-bit type.
CONFIGS = (
    Config(1, 1024, 4),
    Config(2, 1024, 4),
    Config(4, 1024, 8),
    Config(1, 2048, 4),
    Config(1, 2048, 8),
    Config(1, 512, 2),
)

NAMES = ("triton", *(f"triton {c.block_rows}x{c.block_columns}x{c.num_warps}" for c in CONFIGS[1:]))
"""Backends that a measurement may choose: each of CONFIGS by a name that files keep."""


def config_of(backend: str) -> Config:
    """The configuration of that name."""
    return CONFIGS[NAMES.index(backend)]


def launch(launcher: Launcher, like: Tensor, config: Config, *args: Any, **constants: Any) -> None:
    """Launches as many programs as `like` has tiles; args and constants of the kernel, but the tile.

    Raises:
        ValueError: not on a CUDA device (unless Triton interprets), or more tiles than a grid holds.
    """
    if isinstance(launcher.kernel, triton.JITFunction):
        if like.device.type != "cuda":
            raise ValueError(f"backend: expected CUDA tensors for 'triton', got tensors on {like.device}")
    elif like.dtype == torch.bfloat16:
        raise ValueError("backend: expected fp32 or fp16 in Triton's interpreter, which computes bfloat16 wrongly")
    rows, columns = like.shape
    block_rows, block_columns = config.fitted(columns)
    programs = cdiv(rows, block_rows) * cdiv(columns, block_columns)
    if programs > _MAX_PROGRAMS:
        raise ValueError(
            f"up: expected at most {_MAX_PROGRAMS} tiles of {block_rows} x {block_columns}, got {programs}"
        )
    launcher(
        like.device, (programs,), *args, **constants,
        BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, num_warps=config.num_warps,
    )  # fmt: skip
