"""Which queries see a block of keys, where the mask's intervals are loaded: on the device, for any values of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.remembered import Remembered

_FAR = 2**31 - 1


def of_blocks(start: Tensor, stop: Tensor, keys: int, block: int) -> Tensor:
    """Four bounds for each block of keys: queries before the first and from the second on see nothing of it, those from
    the third to the fourth see all of it.

    Args:
        start, stop: int32 (batch or 1, queries), of `Mask`.
        keys: how many there are.
        block: keys in a block.

    Returns:
        int32 (batch or 1, 4, blocks), not to be written into: layers with one mask get the same. The tighter the more
        the intervals only move forward.
    """
    return _of_blocks(start, stop, keys, block)


def _make(start: Tensor, stop: Tensor, keys: int, block: int) -> Tensor:
    first = torch.arange(0, keys, block, dtype=torch.int32, device=start.device).expand(start.shape[0], -1).contiguous()
    last = (first + (block - 1)).clamp_(max=keys - 1)
    blind = start >= stop
    found = [
        torch.searchsorted(_largest_yet(stop.masked_fill(blind, 0)), first, right=True),
        torch.searchsorted(_smallest_from_here(start.masked_fill(blind, _FAR)), last, right=True),
        torch.searchsorted(_smallest_from_here(stop), last, right=True),
        torch.searchsorted(_largest_yet(start), first, right=True),
    ]
    return torch.stack(found, dim=1).to(torch.int32)


def _largest_yet(values: Tensor) -> Tensor:
    return values.cummax(dim=1).values


def _smallest_from_here(values: Tensor) -> Tensor:
    return values.flip(1).cummin(dim=1).values.flip(1)


_of_blocks = Remembered(_make)
