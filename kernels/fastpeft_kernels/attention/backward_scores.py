"""The kernel for what is added to the scores: gradients of `relative` and `bias`, sums of the scores' gradients.

Each program owns what it sums into, so nothing is added atomically, and makes the tiles that go into it again: two
products beside the seven of the other kernels. Distances are constant along diagonals, so a program for them adds the
tiles of a diagonal of tiles to one another, and sums the diagonals of that one tile at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv
from ..common.launching import Launcher
from ..common.triton_random import row_keys
from .arguments import UNSPECIALISED
from .tiles import Tile
from .triton_mask import row_bounds
from .triton_score import COPY_UNIT, load_tile, tile_gradients, tile_scores


@triton.jit(do_not_specialize=[*UNSPECIALISED, "grid_batch", "grid_heads", "grid_rows", "grid_columns", "batches"])
def attention_bwd_scores_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, sums_ptr,
    batches, grid_batch, grid_heads, grid_rows, grid_columns,
    queries, keys, kv_heads, group,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    left, right, start_ptr, stop_ptr, bounds_batch, padding_ptr, padding_batch,
    dense_ptr, dense_batch, dense_head, dense_row,
    scale, softcap, relative_ptr, relative_head, relative_copy, bias_ptr, bias_batch, bias_head, bias_row,
    seed_ptr, threshold, keep_scale,
    UNIT: tl.constexpr, PLAIN: tl.constexpr, NATURAL: tl.constexpr, LOWER: tl.constexpr,
    FEATURES: tl.constexpr, V_FEATURES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BIAS_COLUMN: tl.constexpr, BIAS_UNIT: tl.constexpr, DENSE_COLUMN: tl.constexpr, DENSE_UNIT: tl.constexpr,
    BLOCK: tl.constexpr, RELATIVE: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """RELATIVE: one program a head and diagonal of tiles, from the lower left; sums_ptr (heads, diagonals, 2 BLOCK).
    Else one a tile of the bias; sums_ptr contiguous, in its shape. Where the grid has one of a kind, all are summed."""
    heads = kv_heads * group
    row_blocks, column_blocks = tl.cdiv(queries, BLOCK), tl.cdiv(keys, BLOCK)
    program = tl.program_id(0)
    column_place = program % grid_columns
    row_place = program // grid_columns % grid_rows
    head_place = program // grid_columns // grid_rows % grid_heads
    batch_place = program // grid_columns // grid_rows // grid_heads
    some_batches = batches if grid_batch == 1 else 1
    some_heads = heads if grid_heads == 1 else 1
    some_rows = row_blocks if grid_rows == 1 else 1
    some_columns = column_blocks if grid_columns == 1 else 1
    diagonal = 0
    if RELATIVE:
        diagonal = column_place - (row_blocks - 1)
        row_place = tl.maximum(0, -diagonal)
        column_place = row_place + diagonal
        some_rows = tl.minimum(row_blocks, column_blocks - diagonal) - row_place
        some_columns = 1
    count = some_batches * some_heads * some_rows * some_columns
    if RELATIVE or not (SUM_ROWS or SUM_COLUMNS):  # all tiles are as far from the diagonal
        distance = (column_place - row_place) * BLOCK - (keys - queries)
        if right is not None:
            count = tl.where(distance - (BLOCK - 1) > right, 0, count)
        if left is not None:
            count = tl.where(distance + (BLOCK - 1) < -left, 0, count)

    unit = scale if PLAIN else 1.0
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(0, count):
        column_block = column_place + i % some_columns
        row_block = row_place + i // some_columns % some_rows
        if RELATIVE:
            column_block = row_block + diagonal
        head = (head_place + i // some_columns // some_rows % some_heads).to(tl.int64)
        batch = (batch_place + i // some_columns // some_rows // some_heads).to(tl.int64)
        kv_head = head // group
        stream = batch * heads + head
        row = row_block * BLOCK + tl.arange(0, BLOCK)
        column = column_block * BLOCK + tl.arange(0, BLOCK)
        q = load_tile(
            q_ptr,
            batch,
            head,
            row_block * BLOCK,
            q_batch,
            q_head,
            q_row,
            queries,
            False,
            UNIT,
            FEATURES,
            BLOCK,
            BLOCK_D,
        )
        k = load_tile(
            k_ptr,
            batch,
            kv_head,
            column_block * BLOCK,
            k_batch,
            k_head,
            k_row,
            keys,
            False,
            UNIT,
            FEATURES,
            BLOCK,
            BLOCK_D,
        )
        do = load_tile(
            do_ptr,
            batch,
            head,
            row_block * BLOCK,
            do_batch,
            do_head,
            do_row,
            queries,
            False,
            UNIT,
            V_FEATURES,
            BLOCK,
            BLOCK_V,
        )
        v = load_tile(
            v_ptr,
            batch,
            kv_head,
            column_block * BLOCK,
            v_batch,
            v_head,
            v_row,
            keys,
            False,
            UNIT,
            V_FEATURES,
            BLOCK,
            BLOCK_V,
        )
        lse = tl.load(lse_ptr + stream * queries + row, mask=row < queries, other=float("inf"))
        delta = tl.load(delta_ptr + stream * queries + row, mask=row < queries, other=0.0)
        start_here, stop_here, padding_here = start_ptr, stop_ptr, padding_ptr
        dense_here, relative_here, bias_here = dense_ptr, relative_ptr, bias_ptr
        if start_ptr is not None:
            start_here = start_ptr + batch * bounds_batch
            stop_here = stop_ptr + batch * bounds_batch
        if padding_ptr is not None:
            padding_here = padding_ptr + batch * padding_batch
        if dense_ptr is not None:
            dense_here = dense_ptr + (batch * dense_batch + head * dense_head) * DENSE_UNIT
        if relative_ptr is not None:
            relative_here = relative_ptr + head * (relative_head * COPY_UNIT)
        if bias_ptr is not None:
            bias_here = bias_ptr + (batch * bias_batch + head * bias_head) * BIAS_UNIT
        lower, upper = row_bounds(row, queries, keys, left, right, start_here, stop_here)
        first_key, second_key = row, row
        if seed_ptr is not None:
            first_key, second_key = row_keys(seed_ptr, row.to(tl.int64), stream)
        product = tl.dot(q, tl.trans(k), input_precision="ieee")
        score, _ = tile_scores(
            product, row[:, None], column[None, :], lower[:, None], upper[:, None], queries, keys,
            scale, softcap, relative_here, relative_copy, bias_here, bias_row,
            padding_here, dense_here, dense_row, BIAS_COLUMN, BIAS_UNIT, DENSE_COLUMN, DENSE_UNIT,
            PLAIN, NATURAL, BOUNDED=True, LOWER=LOWER,
        )  # fmt: skip
        dweights = tl.dot(do, tl.trans(v), input_precision="ieee")
        _, dscore = tile_gradients(
            score * unit, dweights, lse[:, None], delta[:, None],
            first_key[:, None], second_key[:, None], column[None, :], seed_ptr, threshold, keep_scale, NATURAL,
        )  # fmt: skip
        sums += dscore

    if RELATIVE:
        place = tl.arange(0, 2 * BLOCK)
        across = place[None, :] - (BLOCK - 1) + tl.arange(0, BLOCK)[:, None]
        inside = (across >= 0) & (across < BLOCK)
        skewed = tl.gather(sums, tl.where(inside, across, 0), 1)
        sums_ptr += program.to(tl.int64) * 2 * BLOCK
        tl.store(sums_ptr + place, tl.sum(tl.where(inside, skewed, 0.0), 0))
    else:
        rows, columns = (1 if SUM_ROWS else queries), (1 if SUM_COLUMNS else keys // BIAS_UNIT * BIAS_UNIT)
        if SUM_ROWS:
            sums = tl.sum(sums, 0)[None, :]
        if SUM_COLUMNS:
            sums = tl.sum(sums, 1)[:, None]
        row = row_place * BLOCK + tl.arange(0, 1 if SUM_ROWS else BLOCK)
        column = column_place * BLOCK + tl.arange(0, 1 if SUM_COLUMNS else BLOCK)
        first_row = (program // grid_columns // grid_rows).to(tl.int64) * rows
        place = sums_ptr + (first_row + row[:, None]) * columns + column[None, :]
        unit_of_columns: tl.constexpr = 1 if SUM_COLUMNS else BIAS_UNIT
        inside = (row < rows)[:, None] & (column // unit_of_columns * unit_of_columns < columns)[None, :]
        tl.store(place, sums.to(sums_ptr.dtype.element_ty), mask=inside)


_launch_scores = Launcher(attention_bwd_scores_kernel)


def relative_gradient(relative: Tensor, batch: int, keys: int, arguments: dict[str, Any], tile: Tile) -> Tensor:
    """The gradient of `Scores.relative`, in its shape and dtype; arguments of the kernel but its grid and sums."""
    heads, distances = relative.shape
    block, queries = tile.block_m, distances - keys + 1
    row_blocks = cdiv(queries, block)
    diagonals = row_blocks + cdiv(keys, block) - 1
    sums = torch.empty((heads, diagonals, 2, block), dtype=torch.float32, device=relative.device)
    _launch(sums, batch, (1, heads, 1, diagonals), arguments, tile, RELATIVE=True, SUM_ROWS=False, SUM_COLUMNS=False)
    # Diagonal d of tiles begins at distance d * block - (row_blocks * block - 1), and its second half where d + 1 does.
    padded = torch.zeros((heads, diagonals + 1, block), dtype=torch.float32, device=relative.device)
    padded[:, :-1] = sums[:, :, 0]
    padded[:, 1:] += sums[:, :, 1]
    return padded.flatten(1).narrow(1, row_blocks * block - queries, distances).to(relative.dtype)


def bias_gradient(bias: Tensor, shape: tuple[int, int, int, int], arguments: dict[str, Any], tile: Tile) -> Tensor:
    """The gradient of `Scores.bias`, which broadcasts to `shape`, in its shape and dtype."""
    sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    sums = torch.empty(sizes, dtype=bias.dtype, device=bias.device)
    rows, columns = cdiv(sizes[2], tile.block_m), cdiv(sizes[3], tile.block_m)
    summed = {"SUM_ROWS": sizes[2] < shape[2], "SUM_COLUMNS": sizes[3] < shape[3]}
    _launch(sums, shape[0], (sizes[0], sizes[1], rows, columns), arguments, tile, RELATIVE=False, **summed)
    return sums.view(bias.shape)


def _launch(
    sums: Tensor, batch: int, grid: tuple[int, int, int, int], arguments: Any, tile: Tile, **kind: bool
) -> None:
    _launch_scores(
        sums.device, (grid[0] * grid[1] * grid[2] * grid[3],),
        **arguments, sums_ptr=sums, batches=batch,
        grid_batch=grid[0], grid_heads=grid[1], grid_rows=grid[2], grid_columns=grid[3],
        BLOCK=tile.block_m, num_warps=tile.num_warps, num_stages=tile.num_stages, **kind,
    )  # fmt: skip
