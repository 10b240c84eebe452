"""The kernel for the gradients of k and v."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.triton_random import row_keys
from .arguments import UNSPECIALISED
from .triton_mask import query_ranges, row_bounds
from .triton_score import COPY_UNIT, load_tile, store_rows, tile_gradients, tile_scores


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_bwd_keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, product_scale, ranges_ptr,
    queries, keys, kv_heads, group,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, do_batch, do_head, do_row,
    left, right, start_ptr, stop_ptr, bounds_batch, padding_ptr, padding_batch,
    dense_ptr, dense_batch, dense_head, dense_row,
    scale, softcap, relative_ptr, relative_head, relative_copy, bias_ptr, bias_batch, bias_head, bias_row,
    seed_ptr, threshold, keep_scale,
    UNIT: tl.constexpr, PLAIN: tl.constexpr, NATURAL: tl.constexpr, LOWER: tl.constexpr,
    FEATURES: tl.constexpr, V_FEATURES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BIAS_COLUMN: tl.constexpr, BIAS_UNIT: tl.constexpr, DENSE_COLUMN: tl.constexpr, DENSE_UNIT: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program a block of keys of one head of keys, which sums over the heads of queries that read it.

    Tiles are keys x queries, so that no result of a product is ever transposed. What is the same in all iterations is
    computed again in each, in registers that are few: the sums of 128 keys take half of them.
    """
    blocks = tl.cdiv(keys, BLOCK_N)
    program = tl.program_id(0)
    n = (program % blocks) * BLOCK_N
    batch = (program // blocks // kv_heads).to(tl.int64)
    kv_head = (program // blocks % kv_heads).to(tl.int64)
    heads = kv_heads * group
    if start_ptr is not None:
        start_ptr += batch * bounds_batch
        stop_ptr += batch * bounds_batch
        ranges_ptr += tl.where(bounds_batch > 0, batch, 0) * 4 * blocks + program % blocks
    if padding_ptr is not None:
        padding_ptr += batch * padding_batch

    column = n + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, batch, kv_head, n, k_batch, k_head, k_row, keys, TMA, UNIT, FEATURES, BLOCK_N, BLOCK_D)
    v = load_tile(v_ptr, batch, kv_head, n, v_batch, v_head, v_row, keys, TMA, UNIT, V_FEATURES, BLOCK_N, BLOCK_V)
    begin, inner_begin, inner_end, end = query_ranges(
        n, queries, keys, left, right, ranges_ptr, blocks, BLOCK_M, BLOCK_N
    )
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    unit = scale if PLAIN else 1.0
    for member in tl.range(0, group, disable_licm=True):
        head = kv_head * group + member
        stream = batch * heads + head
        lse_head_ptr = lse_ptr + stream * queries
        delta_head_ptr = delta_ptr + stream * queries
        dense_head_ptr, relative_head_ptr, bias_head_ptr = dense_ptr, relative_ptr, bias_ptr
        if dense_ptr is not None:
            dense_head_ptr = dense_ptr + (batch * dense_batch + head * dense_head) * DENSE_UNIT
        if relative_ptr is not None:
            relative_head_ptr = relative_ptr + head * (relative_head * COPY_UNIT)
        if bias_ptr is not None:
            bias_head_ptr = bias_ptr + (batch * bias_batch + head * bias_head) * BIAS_UNIT
        for part in tl.static_range(3):
            if part < 2 or LOWER:
                first = begin if part == 0 else (inner_begin if part == 1 else inner_end)
                last = inner_begin if part == 0 else (inner_end if part == 1 else end)
                for m in tl.range(first, last, BLOCK_M, disable_licm=True):
                    row = m // 16 * 16 + tl.arange(0, BLOCK_M)  # a multiple it is, which Triton cannot know
                    q = load_tile(
                        q_ptr, batch, head, m, q_batch, q_head, q_row, queries, TMA, UNIT, FEATURES, BLOCK_M, BLOCK_D
                    )
                    product = tl.dot(k, tl.trans(q), input_precision="ieee")
                    lower, upper = row, row
                    if part != 1:
                        lower, upper = row_bounds(row, queries, keys, left, right, start_ptr, stop_ptr)
                    first_key, second_key = row, row
                    if seed_ptr is not None:
                        first_key, second_key = row_keys(seed_ptr, row.to(tl.int64), stream)
                    score, slope = tile_scores(
                        product, row[None, :], column[:, None], lower[None, :], upper[None, :], queries, keys,
                        scale, softcap, relative_head_ptr, relative_copy, bias_head_ptr, bias_row,
                        padding_ptr, dense_head_ptr, dense_row, BIAS_COLUMN, BIAS_UNIT, DENSE_COLUMN, DENSE_UNIT,
                        PLAIN, NATURAL, BOUNDED=part != 1, LOWER=LOWER, ALONG_QUERIES=True,
                    )  # fmt: skip
                    lse = tl.load(lse_head_ptr + row, mask=row < queries, other=float("inf"))
                    do = load_tile(
                        do_ptr,
                        batch,
                        head,
                        m,
                        do_batch,
                        do_head,
                        do_row,
                        queries,
                        TMA,
                        UNIT,
                        V_FEATURES,
                        BLOCK_M,
                        BLOCK_V,
                    )
                    dweights = tl.dot(v, tl.trans(do), input_precision="ieee")
                    delta = tl.load(delta_head_ptr + row, mask=row < queries, other=0.0)
                    weights, dscore = tile_gradients(
                        score * unit, dweights, lse[None, :], delta[None, :],
                        first_key[None, :], second_key[None, :], column[:, None],
                        seed_ptr, threshold, keep_scale, NATURAL,
                    )  # fmt: skip
                    dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
                    if softcap is not None:
                        dscore *= slope
                    dk = tl.dot(dscore.to(q.dtype), q, dk, input_precision="ieee")
    dk_ptr += (batch * dk_batch + kv_head * dk_head) * UNIT
    dv_ptr += (batch * dv_batch + kv_head * dv_head) * UNIT
    store_rows(dk_ptr, dk * product_scale, column, dk_row * UNIT, keys, FEATURES, BLOCK_D)
    store_rows(dv_ptr, dv * keep_scale, column, dv_row * UNIT, keys, V_FEATURES, BLOCK_V)
