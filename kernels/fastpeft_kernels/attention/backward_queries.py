"""The kernel for the gradient of q."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.triton_random import row_keys
from .arguments import UNSPECIALISED
from .triton_mask import key_ranges, row_bounds
from .triton_score import COPY_UNIT, load_tile, store_rows, tile_gradients, tile_scores


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_bwd_queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dq_batch, dq_head, dq_row, product_scale,
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
    """One program a block of queries of one head, in the order of the forward kernel."""
    blocks = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    inner = program // group
    m = (blocks - 1 - inner % blocks) * BLOCK_M
    batch = (inner // blocks // kv_heads).to(tl.int64)
    kv_head = (inner // blocks % kv_heads).to(tl.int64)
    head = kv_head * group + program % group
    dq_ptr += (batch * dq_batch + head * dq_head) * UNIT
    stream = batch * kv_heads * group + head
    if start_ptr is not None:
        start_ptr += batch * bounds_batch
        stop_ptr += batch * bounds_batch
    if padding_ptr is not None:
        padding_ptr += batch * padding_batch
    if dense_ptr is not None:
        dense_ptr += (batch * dense_batch + head * dense_head) * DENSE_UNIT
    if relative_ptr is not None:
        relative_ptr += head * (relative_head * COPY_UNIT)
    if bias_ptr is not None:
        bias_ptr += (batch * bias_batch + head * bias_head) * BIAS_UNIT

    row = m + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, batch, head, m, q_batch, q_head, q_row, queries, TMA, UNIT, FEATURES, BLOCK_M, BLOCK_D)
    do = load_tile(do_ptr, batch, head, m, do_batch, do_head, do_row, queries, TMA, UNIT, V_FEATURES, BLOCK_M, BLOCK_V)
    lse = tl.load(lse_ptr + stream * queries + row, mask=row < queries, other=float("inf"))
    delta = tl.load(delta_ptr + stream * queries + row, mask=row < queries, other=0.0)
    lower, upper = row_bounds(row, queries, keys, left, right, start_ptr, stop_ptr)
    begin, inner_begin, inner_end, end = key_ranges(lower, upper, keys, BLOCK_N)
    first_key, second_key = row, row
    if seed_ptr is not None:
        first_key, second_key = row_keys(seed_ptr, row.to(tl.int64), stream)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    unit = scale if PLAIN else 1.0
    for part in tl.static_range(3):
        if part > 0 or LOWER:
            first = begin if part == 0 else (inner_begin if part == 1 else inner_end)
            last = inner_begin if part == 0 else (inner_end if part == 1 else end)
            for n in range(first, last, BLOCK_N):
                column = n // 16 * 16 + tl.arange(0, BLOCK_N)  # a multiple it is, which Triton cannot know
                k = load_tile(
                    k_ptr, batch, kv_head, n, k_batch, k_head, k_row, keys, TMA, UNIT, FEATURES, BLOCK_N, BLOCK_D
                )
                v = load_tile(
                    v_ptr, batch, kv_head, n, v_batch, v_head, v_row, keys, TMA, UNIT, V_FEATURES, BLOCK_N, BLOCK_V
                )
                product = tl.dot(q, tl.trans(k), input_precision="ieee")
                score, slope = tile_scores(
                    product, row[:, None], column[None, :], lower[:, None], upper[:, None], queries, keys,
                    scale, softcap, relative_ptr, relative_copy, bias_ptr, bias_row,
                    padding_ptr, dense_ptr, dense_row, BIAS_COLUMN, BIAS_UNIT, DENSE_COLUMN, DENSE_UNIT,
                    PLAIN, NATURAL, BOUNDED=part != 1, LOWER=LOWER,
                )  # fmt: skip
                dweights = tl.dot(do, tl.trans(v), input_precision="ieee")
                _, dscore = tile_gradients(
                    score * unit, dweights, lse[:, None], delta[:, None],
                    first_key[:, None], second_key[:, None], column[None, :], seed_ptr, threshold, keep_scale, NATURAL,
                )  # fmt: skip
                if softcap is not None:
                    dscore *= slope
                dq = tl.dot(dscore.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(dq_ptr, dq * product_scale, row, dq_row * UNIT, queries, FEATURES, BLOCK_D)
