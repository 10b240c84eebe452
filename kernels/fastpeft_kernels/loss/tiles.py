"""What the Triton launchers of this family share: tile sizes and checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.integers import next_power_of_2

_MAX_PROGRAMS = 2**31 - 1


@dataclass(frozen=True)
class Config:
    """How many words of a row a program takes at a time (a power of two), and its warps."""

    block: int
    num_warps: int

    def fitted(self, words: int, *tensors: Tensor) -> dict[str, int]:
        """LANES and WIDTH of a block for rows of so many words: a lane is 16 bytes of the narrowest tensor's row.

        A sum or maximum along a lane needs nothing from other threads.
        """
        width = 16 // min(tensor.element_size() for tensor in tensors)
        block = min(self.block, max(width, next_power_of_2(words)))
        return {"LANES": block // width, "WIDTH": width}


# First the default: 16 elements a thread in flight.
CONFIGS = (
    Config(4096, 8),
    Config(2048, 4),
    Config(2048, 8),
    Config(4096, 4),
    Config(1024, 4),
    Config(8192, 8),
    Config(8192, 16),
)


def check_launch(kernel: Any, like: Tensor, programs: int) -> None:
    """What no kernel of this family can be launched for.

    Raises:
        ValueError: not on a CUDA device (unless Triton interprets), or more programs than a grid holds.
    """
    if isinstance(kernel, triton.JITFunction):
        if like.device.type != "cuda":
            raise ValueError(f"backend: expected CUDA tensors for 'triton', got tensors on {like.device}")
    elif like.dtype == torch.bfloat16:
        raise ValueError("backend: expected fp32 or fp16 in Triton's interpreter, which computes bfloat16 wrongly")
    if programs > _MAX_PROGRAMS:
        raise ValueError(f"logits: expected at most {_MAX_PROGRAMS} tiles, got {programs}")
