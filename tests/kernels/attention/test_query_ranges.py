"""Which queries see a block of keys: found for any intervals, and exactly where they move forward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft_kernels.attention.query_ranges import of_blocks

KEYS, BLOCK = 50, 16


def seen(start: Tensor, stop: Tensor) -> Tensor:
    """(batch, queries, keys)."""
    keys = torch.arange(KEYS)
    return (keys >= start[..., None]) & (keys < stop[..., None])


def test_no_block_is_missed_whatever_the_intervals() -> None:
    torch.manual_seed(0)
    for _ in range(50):
        start, stop = (torch.randint(-5, KEYS + 5, (2, 13), dtype=torch.int32) for _ in range(2))
        ranges = of_blocks(start, stop, KEYS, BLOCK)
        for entry, visible in enumerate(seen(start, stop)):
            for i, block in enumerate(visible.split(BLOCK, dim=1)):
                begin, end, inner_begin, inner_end = ranges[entry, :, i].tolist()
                assert not block[:begin].any() and not block[max(end, 0) :].any()
                assert block[inner_begin : max(inner_end, inner_begin)].all()


def test_nothing_in_excess_where_they_move_forward() -> None:
    start = torch.tensor([[0, 0, 0, 20, 20, 40, 40]], dtype=torch.int32)
    stop = torch.tensor([[20, 20, 20, 40, 40, 50, 50]], dtype=torch.int32)
    ranges = of_blocks(start, stop, KEYS, BLOCK)[0].tolist()
    assert ranges[:2] == [[0, 0, 3, 5], [3, 5, 7, 7]]
    inner = [(begin, end) if begin < end else None for begin, end in zip(*ranges[2:], strict=True)]
    assert inner == [(0, 3), None, None, (5, 7)]
