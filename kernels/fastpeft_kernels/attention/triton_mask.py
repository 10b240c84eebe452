"""Masks in Triton: every row sees one interval of keys, and blocks are skipped or left unmasked by it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_bounds(row, queries, keys, left, right, start_ptr, stop_ptr):
    """lower and upper of the keys that each of the rows sees, lower <= key < upper, int32 of the shape of `row`.

    Rows past the last have the bounds of the last, so that they widen no block. Pointers are those of the batch entry,
    or None, as left and right may be.
    """
    row = tl.minimum(row, queries - 1)
    position = row + (keys - queries)
    lower = row * 0
    upper = lower + keys
    if left is not None:
        lower = tl.maximum(lower, position - left)
    if right is not None:
        upper = tl.minimum(upper, position + right + 1)
    if start_ptr is not None:
        lower = tl.maximum(lower, tl.load(start_ptr + row))
        upper = tl.minimum(upper, tl.load(stop_ptr + row))
    return lower, upper


@triton.jit
def key_ranges(lower, upper, keys, BLOCK: tl.constexpr):
    """begin <= inner_begin <= inner_end <= end: what some row of a block sees, and between what all of them see.

    The first three are multiples of BLOCK, or beyond the end.
    """
    some = lower < upper
    begin = tl.min(tl.where(some, lower, keys), 0) // BLOCK * BLOCK
    end = tl.max(tl.where(some, upper, 0), 0)
    inner_begin = tl.minimum(tl.maximum(tl.cdiv(tl.max(lower, 0), BLOCK) * BLOCK, begin), end)
    inner_end = tl.maximum(tl.minimum(tl.min(upper, 0) // BLOCK * BLOCK, end), inner_begin)
    return begin, inner_begin, inner_end, end


@triton.jit
def query_ranges(
    first_key, queries, keys, left, right, ranges_ptr, blocks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The same for the queries that see a block of BLOCK_N keys; ranges_ptr as `query_ranges.of_blocks` makes it."""
    offset = keys - queries
    last_key = tl.minimum(first_key + BLOCK_N, keys) - 1
    begin = first_key * 0
    end = begin + queries
    inner_begin = begin
    inner_end = end
    if right is not None:
        begin = tl.maximum(begin, first_key - right - offset)
        inner_begin = tl.maximum(inner_begin, last_key - right - offset)
    if left is not None:
        end = tl.minimum(end, last_key + left - offset + 1)
        inner_end = tl.minimum(inner_end, first_key + left - offset + 1)
    if ranges_ptr is not None:
        begin = tl.maximum(begin, tl.load(ranges_ptr))
        end = tl.minimum(end, tl.load(ranges_ptr + blocks))
        inner_begin = tl.maximum(inner_begin, tl.load(ranges_ptr + 2 * blocks))
        inner_end = tl.minimum(inner_end, tl.load(ranges_ptr + 3 * blocks))
    begin = begin // BLOCK_M * BLOCK_M
    inner_begin = tl.minimum(tl.maximum(tl.cdiv(inner_begin, BLOCK_M) * BLOCK_M, begin), end)
    # Rows past the last see nothing whatever the mask says, so that the last block need not be a whole one.
    inner_end = tl.where(inner_end >= queries, queries, inner_end // BLOCK_M * BLOCK_M)
    inner_end = tl.maximum(tl.minimum(inner_end, end), inner_begin)
    return begin, inner_begin, inner_end, end


@triton.jit
def seen(
    row, column, lower, upper, queries, keys,
    padding_ptr, dense_ptr, dense_row, DENSE_COLUMN: tl.constexpr, DENSE_UNIT: tl.constexpr,
    BOUNDED: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    """Whether the row sees the column, where that depends on the element: shapes that broadcast to a tile."""
    inside = column < keys
    if padding_ptr is not None:
        inside &= tl.load(padding_ptr + column, mask=inside, other=0) != 0
    if BOUNDED:
        inside &= column < upper
        if LOWER:
            inside &= column >= lower
    if dense_ptr is not None:
        place = dense_ptr + row.to(tl.int64) * (dense_row * DENSE_UNIT) + column.to(tl.int64) * DENSE_COLUMN
        there = (row < queries) & (column // DENSE_UNIT * DENSE_UNIT < keys)
        inside = inside & (tl.load(place, mask=there, other=0) != 0)
    return inside
