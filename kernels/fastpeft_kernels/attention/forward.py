"""The forward kernel: FlashAttention-2 (T. Dao, 2023), with intervals of keys for a mask.

Plan, for a head of 4096 tokens, D = 128, causal, bf16, on an H200: two products of 2.1 GFLOP over what is seen, 4.3 us
of the whole GPU at 989 TFLOP/s, against 4.2 MB read and written, 0.9 us: tensor cores count, and exponentials beside
them. A tile of 128 x 128 takes 2048 cycles of products and 1024 of exponentials at 16 a cycle, and each further
instruction an element 128: hence the scale in a fused multiply-add, powers of 2, and masks in boundary blocks
alone. Its sums take 64 registers a thread of 8 warps, scores as many; q and two stages of k and v 160 KB of shared
memory. Heads are padded to powers of two: 96 and 192 cost a third more, 80 as much as 128. Not measured on a GPU yet.

Nothing depends on the host's knowing a number of the mask: the loops' ends are computed from it on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv
from ..common.launching import Launcher
from ..common.triton_random import kept, row_keys
from .arguments import UNSPECIALISED, common_arguments, rows_of, strides_of
from .descriptors import sources
from .masks import Mask
from .scores import Scores
from .tiles import Tiles, default_tiles
from .triton_mask import key_ranges, row_bounds
from .triton_score import COPY_UNIT, LN2, LOG2E, load_tile, power, store_rows, tile_scores


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sinks_ptr,
    queries, keys, kv_heads, group,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    left, right, start_ptr, stop_ptr, bounds_batch, padding_ptr, padding_batch,
    dense_ptr, dense_batch, dense_head, dense_row,
    scale, softcap, relative_ptr, relative_head, relative_copy, bias_ptr, bias_batch, bias_head, bias_row,
    seed_ptr, threshold, keep_scale,
    UNIT: tl.constexpr, PLAIN: tl.constexpr, NATURAL: tl.constexpr, LOWER: tl.constexpr,
    FEATURES: tl.constexpr, V_FEATURES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BIAS_COLUMN: tl.constexpr, BIAS_UNIT: tl.constexpr, DENSE_COLUMN: tl.constexpr, DENSE_UNIT: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program a block of queries of one head. Heads that share keys are neighbours; the last queries come first,
    which see the most keys where the mask is causal."""
    blocks = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    inner = program // group
    m = (blocks - 1 - inner % blocks) * BLOCK_M
    batch = (inner // blocks // kv_heads).to(tl.int64)
    kv_head = (inner // blocks % kv_heads).to(tl.int64)
    head = kv_head * group + program % group
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
    heads = kv_heads * group
    q = load_tile(q_ptr, batch, head, m, q_batch, q_head, q_row, queries, TMA, UNIT, FEATURES, BLOCK_M, BLOCK_D)
    lower, upper = row_bounds(row, queries, keys, left, right, start_ptr, stop_ptr)
    begin, inner_begin, inner_end, end = key_ranges(lower, upper, keys, BLOCK_N)
    first_key, second_key = row, row
    if seed_ptr is not None:
        first_key, second_key = row_keys(seed_ptr, row.to(tl.int64), batch * heads + head)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)  # of the exponentials, in units of the power of top, the largest score yet
    top = total + float("-inf")
    if sinks_ptr is not None:
        top = total + tl.load(sinks_ptr + head).to(tl.float32) * (1.0 if NATURAL else LOG2E)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
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
                product = tl.dot(q, tl.trans(k), input_precision="ieee")
                score, _ = tile_scores(
                    product, row[:, None], column[None, :], lower[:, None], upper[:, None], queries, keys,
                    scale, softcap, relative_ptr, relative_copy, bias_ptr, bias_row,
                    padding_ptr, dense_ptr, dense_row, BIAS_COLUMN, BIAS_UNIT, DENSE_COLUMN, DENSE_UNIT,
                    PLAIN, NATURAL, BOUNDED=part != 1, LOWER=LOWER,
                )  # fmt: skip
                above = tl.maximum(top, tl.max(score, 1) * unit)
                finite = tl.where(above == float("-inf"), 0.0, above)
                weights = power(score * unit - finite[:, None], NATURAL)
                shrink = power(top - finite, NATURAL)
                total = total * shrink + tl.sum(weights, 1)
                acc = acc * shrink[:, None]
                if seed_ptr is not None:
                    keep = kept(first_key[:, None], second_key[:, None], column[None, :], threshold)
                    weights = tl.where(keep, weights, 0.0)
                v = load_tile(
                    v_ptr, batch, kv_head, n, v_batch, v_head, v_row, keys, TMA, UNIT, V_FEATURES, BLOCK_N, BLOCK_V
                )
                acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
                top = above
    total = tl.where(top == float("-inf"), 1.0, total)
    factor = 1.0 / total
    if seed_ptr is not None:
        factor *= keep_scale
    out_row = heads * V_FEATURES
    out_ptr += batch * queries * out_row + head * V_FEATURES
    store_rows(out_ptr, acc * factor[:, None], row, out_row, queries, V_FEATURES, BLOCK_V)
    lse = top + tl.log(total) if NATURAL else (top + tl.log2(total)) * LN2
    tl.store(lse_ptr + (batch * heads + head) * queries + row, lse, mask=row < queries)


_launch = Launcher(attention_fwd_kernel)


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: Scores, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.attention_reference` in one launch, with fp32 sums.

    Args:
        q, k, v, mask, scores: as there; q, k and v in one of fp16, bf16 and fp32, any strides.
        tiles: `tiles.default_tiles` if None.

    Returns:
        (batch, heads, queries, v_features), laid out (batch, queries, heads, v_features), and (batch, heads, queries)
        in fp32.
    """
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    batch, heads, queries, _ = q.shape
    tile = (tiles or default_tiles(q, v, mask, scores)).forward
    out = torch.empty((batch, queries, heads, v.shape[3]), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if lse.numel():
        _launch(
            q.device, (batch * heads * cdiv(queries, tile.block_m),),
            **sources(tile, q, k, v), out_ptr=out, lse_ptr=lse, sinks_ptr=scores.sinks,
            **common_arguments(q, k, v, mask, scores), **strides_of(q=q, k=k, v=v),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse
