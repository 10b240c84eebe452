"""A mask as FlexAttention takes it: blocks that some query sees, blocks that all of theirs see, and a function of both.

torch's `create_block_mask` asks that function for all queries x keys first. Here blocks come of the ends of each
query's interval, in memory of queries + keys + blocks, without a wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..masks import Mask

BLOCK = 128


def blocks_of(mask: Mask, q: Tensor, k: Tensor) -> Any:
    """torch's BlockMask for all heads; None where all is seen."""
    if mask.left is None and mask.right is None and mask.start is None and mask.keys is None:
        return None
    from torch.nn.attention.flex_attention import BlockMask

    queries, keys, batch = q.shape[2], k.shape[2], q.shape[0]
    lower, upper = row_bounds(mask, queries, keys, q.device)
    some, whole = seen_blocks(lower, upper, mask.keys, keys)
    some, whole = (x.expand(batch, -1, -1)[:, None] for x in (some & ~whole, whole))
    plain = mask.right == 0 and mask.left is None and mask.start is None and queries == keys
    function = _mask_mod(None if plain else _rows(lower, batch), _rows(upper, batch), _rows(mask.keys, batch))
    return BlockMask.from_kv_blocks(
        *_ordered(some), *_ordered(whole), BLOCK_SIZE=BLOCK, mask_mod=function, seq_lengths=(queries, keys)
    )


def row_bounds(mask: Mask, queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 (1 or batch, queries): lower <= key < upper is what all parts of the mask but `keys` and `dense` allow."""
    position = torch.arange(keys - queries, keys, dtype=torch.int32, device=device)[None]
    lower, upper = torch.zeros_like(position), torch.full_like(position, keys)
    if mask.left is not None:
        lower = torch.maximum(lower, position - mask.left)
    if mask.right is not None:
        upper = torch.minimum(upper, position + mask.right + 1)
    if mask.start is not None and mask.stop is not None:
        lower, upper = torch.maximum(lower, mask.start), torch.minimum(upper, mask.stop)
    return lower, upper


def seen_blocks(lower: Tensor, upper: Tensor, marks: Tensor | None, keys: int) -> tuple[Tensor, Tensor]:
    """bool (1 or batch, blocks of queries, blocks of keys): whether some query may see some key; and each all.

    Blocks over the edges are none of the latter.

    Args:
        lower, upper: of `row_bounds`.
        marks: bool (1 or batch, keys), of `Mask.keys`.
    """
    queries = lower.shape[1]
    rows, columns = -(-queries // BLOCK), -(-keys // BLOCK)
    over = rows * BLOCK - queries
    blind = lower >= upper
    first = torch.arange(columns, dtype=torch.int32, device=lower.device) * BLOCK

    def ends(bounds: Tensor, fill: int) -> Tensor:
        return pad(bounds, (0, over), value=fill).view(-1, rows, BLOCK)

    begin = ends(lower.masked_fill(blind, keys), keys).amin(-1)[..., None]
    end = ends(upper.masked_fill(blind, 0), 0).amax(-1)[..., None]
    some = (begin < first + BLOCK) & (end > first)
    whole = (ends(lower, keys).amax(-1)[..., None] <= first) & (ends(upper, 0).amin(-1)[..., None] >= first + BLOCK)
    if marks is not None:
        blocks = pad(marks, (0, columns * BLOCK - keys)).view(marks.shape[0], 1, columns, BLOCK)
        some, whole = some & blocks.any(-1), whole & blocks.all(-1)
    return some, whole


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many there are in each row, and which, before the others."""
    number = blocks.sum(-1, dtype=torch.int32)
    return number, blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def _rows(x: Tensor | None, batch: int) -> Tensor | None:
    return None if x is None else x.expand(batch, -1).contiguous()


def _mask_mod(lower: Tensor | None, upper: Tensor | None, marks: Tensor | None) -> Callable[..., Tensor]:
    """No number of the mask is in it, only tensors: numbers would be compiled in. `lower` None is causal."""

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    def within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= lower[batch, query]) & (key < upper[batch, query])  # type: ignore[index]

    bounds = causal if lower is None else within
    if marks is None:
        return bounds

    def marked(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return bounds(batch, head, query, key) & marks[batch, key]  # type: ignore[index]

    return marked
