"""A bias by distance as the kernels read it.

A row of a tile reads the same numbers as the row above, from one place further on. Read so, every element is a load of
its own, because rows begin at any place. Hence copies, each shifted by one, of which every row takes the one in which
it begins aligned, and 8 bytes are read at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.remembered import Remembered

COPY_BITS = 64
"""What one load reads: so many copies there are as elements in it."""
UNIT = 16
"""Elements; steps between copies and heads are multiples of it."""
MARGIN = 128
"""Elements before the first distance and behind the last that tiles over the edges may read: rows of a tile at most."""


def in_copies(relative: Tensor, reverse: bool = False) -> Tensor:
    """(heads, copies, length), zeros around: copies[:, c, x] is the bias at distance index x + c - MARGIN.

    Args:
        relative: (heads, distances), in fp32, fp16 or bf16.
        reverse: of the bias in reversed order.

    Returns:
        Not to be written into: layers with one bias get the same, forward and backward.
    """
    return _in_copies(relative, reverse)


def _make(relative: Tensor, reverse: bool) -> Tensor:
    relative = relative.detach().flip(1) if reverse else relative.detach()
    heads, distances = relative.shape
    copies = COPY_BITS // (8 * relative.element_size())
    length = -(-(distances + 2 * MARGIN) // UNIT) * UNIT
    padded = torch.nn.functional.pad(relative, (MARGIN, length + copies - MARGIN - distances))
    return padded.as_strided((heads, copies, length), (padded.stride(0), 1, 1)).contiguous()


_in_copies = Remembered(_make)
