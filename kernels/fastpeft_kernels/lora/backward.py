"""Triton kernels of the backward pass: dB and dS from dY, dA from X, and what the adapters add to dX.

dX = dY W + dS A without dropout is `forward.lora_linear` on transposed views. Sums over tokens go through partial sums
in a buffer, added in a fixed order: no float atomics, the same result every time.

Plan for M = 8192 tokens, K = N = 4096, r = 16, bf16, at 700 TFLOP/s and 4.8 TB/s, and what an H200 took, some 11 us of
it for writing back what the second-level cache held; cuBLAS, bound by the same reads, took 27 us for each.

| kernel | GFLOP | MB | floor | predicted | measured | why |
|---|---|---|---|---|---|---|
| lora_up_bwd (dS and dB) | 2.1 | 67 + 25 | 19 us | 25 us | 39 us | one read of dY; 12.6 MB of partial sums |
| lora_down_fwd on dY, lora_down_bwd_weight | 2.1 | 135 + 4 | 29 us | 36 us | 47 us | two reads; used above rank 16 |
| lora_down_bwd_weight (dA) | 1.07 | 67 + 4 | 15 us | 19 us | 26 us | 9 token splits of 32 column blocks |
| the same with dropout | 1.07 | 67 + 4 | 28 us | 34 us | 57 us | integer instructions of the mask |
| lora_down_bwd_input (dX += dropout(dS A)) | 1.07 | 135 | 28 us | 40 us | 55 us | reads and writes dX, mask beside |

One read of dY costs partial sums of dS for each 256 columns, 16 * M * r * 4 bytes written and read: at r = 16 17 MB for
67 MB saved, at r = 64 as much as is saved. So it serves one block of 16 ranks only.

No dot takes the result of another. What dropout changes in registers is the second operand, as in `forward.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv
from ..common.launching import Launcher
from ..common.random import keep_threshold
from ..common.triton_random import kept, row_keys
from .configs import INPUT, UP, WEIGHT, Config, default_config
from .forward import block_of_row, stack_strides
from .mixed_rows import RowSlots
from .partial_sums import lora_sum, splits_of, sums_of_slots


@triton.jit(do_not_specialize=["tokens"])
def lora_up_bwd_kernel(
    dy_ptr, b_ptr, s_ptr, ds_ptr, db_ptr, blocks_ptr,
    tokens, out_features, rank, split_tokens,
    dy_row_stride, b_slot_stride, b_row_stride, s_row_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums of dS = dY B and dB = dY^T S from one read of dY; rank <= BLOCK_R.

    Program (i, j) reads column block i of dY in token split j. It writes its share of dS, fp32 (column blocks, tokens,
    rank), and its share of dB, fp32 (splits, out_features, rank). In a mixed batch the splits are those of
    `RowSlots.splits`; else blocks_ptr is None.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    if blocks_ptr is None:  # split_tokens is a multiple of BLOCK_M
        first, end, steps = split.to(tl.int64) * split_tokens, tokens, split_tokens // BLOCK_M
    else:
        first, end, slot = block_of_row(blocks_ptr, split)
        steps = tl.cdiv(end - first, BLOCK_M)
        b_ptr += slot * b_slot_stride
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    in_columns, in_rank = n < out_features, (r < rank)[:, None]
    wide = n.to(tl.int64)
    b = tl.load(b_ptr + wide[None, :] * b_row_stride + r[:, None], mask=in_columns[None, :] & in_rank, other=0.0)
    acc = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    row = first + tl.arange(0, BLOCK_M)
    dy_ptrs = dy_ptr + row[:, None] * dy_row_stride + n[None, :]
    s_ptrs = s_ptr + row[None, :] * s_row_stride + r[:, None]
    ds_ptrs = ds_ptr + (block.to(tl.int64) * tokens + row[None, :]) * rank + r[:, None]
    for _ in range(0, steps):
        inside = row < end
        dy = tl.load(dy_ptrs, mask=inside[:, None] & in_columns[None, :], other=0.0)
        s = tl.load(s_ptrs, mask=inside[None, :] & in_rank, other=0.0)
        acc = tl.dot(s, dy, acc)
        tl.store(ds_ptrs, tl.dot(b, tl.trans(dy)), mask=inside[None, :] & in_rank)
        row += BLOCK_M
        dy_ptrs += BLOCK_M * dy_row_stride
        s_ptrs += BLOCK_M * s_row_stride
        ds_ptrs += BLOCK_M * rank
    db_ptrs = db_ptr + (split.to(tl.int64) * out_features + wide[None, :]) * rank + r[:, None]
    tl.store(db_ptrs, acc, mask=in_columns[None, :] & in_rank)


@triton.jit(do_not_specialize=["tokens", "stream", "threshold"])
def lora_down_bwd_weight_kernel(
    x_ptr, ds_ptr, seed_ptr, out_ptr, blocks_ptr,
    tokens, features, rank, split_tokens,
    x_row_stride, ds_row_stride, out_split_stride, out_rank_stride, out_feature_stride,
    stream, threshold, scale,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums over token splits of scale * dS^T keep(X): fp32, any strides. Also dB^T = S^T dY.

    In a mixed batch the splits are those of `RowSlots.splits`; else blocks_ptr is None.
    """
    split = tl.program_id(1)
    if blocks_ptr is None:  # split_tokens is a multiple of BLOCK_M
        first_row, end, steps = split.to(tl.int64) * split_tokens, tokens, split_tokens // BLOCK_M
    else:
        first_row, end, _ = block_of_row(blocks_ptr, split)
        steps = tl.cdiv(end - first_row, BLOCK_M)
    across = tl.cdiv(rank, BLOCK_R)
    r = (tl.program_id(0) % across) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = (tl.program_id(0) // across) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_rank, in_columns = (r < rank)[:, None], (k < features)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    row = first_row + tl.arange(0, BLOCK_M)
    x_ptrs = x_ptr + row[:, None] * x_row_stride + k[None, :]
    ds_ptrs = ds_ptr + row[None, :] * ds_row_stride + r[:, None]
    for _ in range(0, steps):
        inside = row < end
        ds = tl.load(ds_ptrs, mask=inside[None, :] & in_rank, other=0.0)
        x = tl.load(x_ptrs, mask=inside[:, None] & in_columns, other=0.0).to(ds.dtype)
        if HAS_DROPOUT:
            first, second = row_keys(seed_ptr, row, stream)
            x = tl.where(kept(first[:, None], second[:, None], k[None, :], threshold), x, 0.0)
        acc = tl.dot(ds, x, acc, input_precision="ieee")
        row += BLOCK_M
        x_ptrs += BLOCK_M * x_row_stride
        ds_ptrs += BLOCK_M * ds_row_stride
    if HAS_DROPOUT:
        acc *= scale
    out_ptrs = out_ptr + split.to(tl.int64) * out_split_stride + k[None, :].to(tl.int64) * out_feature_stride
    tl.store(out_ptrs + r[:, None].to(tl.int64) * out_rank_stride, acc, mask=in_columns & in_rank)


@triton.jit(do_not_specialize=["tokens", "stream", "threshold"])
def lora_down_bwd_input_kernel(
    ds_ptr, a_ptr, dx_ptr, seed_ptr, bias_ptr, blocks_ptr,
    tokens, in_features, rank,
    ds_row_stride, a_slot_stride, a_row_stride, a_column_stride, dx_row_stride,
    stream, threshold, scale,
    HAS_DROPOUT: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dX = (dX) + scale * keep(dS A) + bias; one program a tile of dX, columns fastest.

    In a mixed batch blocks of tokens are those of `RowSlots.blocks`; else blocks_ptr is None.
    """
    across = tl.cdiv(in_features, BLOCK_K)
    block = tl.program_id(0) // across
    if blocks_ptr is None:
        first_row, end = block.to(tl.int64) * BLOCK_M, tokens
    else:
        first_row, end, slot = block_of_row(blocks_ptr, block)
        a_ptr += slot * a_slot_stride
    row = first_row + tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) % across) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_rows, in_columns = (row < end)[:, None], (k < in_features)[None, :]
    r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    ds_ptrs = ds_ptr + row[:, None] * ds_row_stride + r[None, :]
    a_ptrs = a_ptr + r[:, None].to(tl.int64) * a_row_stride + k[None, :].to(tl.int64) * a_column_stride
    for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
        ds = tl.load(ds_ptrs, mask=in_rows & (r < rank - r0)[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=in_columns & (r < rank - r0)[:, None], other=0.0)
        acc = tl.dot(ds, a, acc, input_precision="ieee")
        ds_ptrs += BLOCK_R
        a_ptrs += BLOCK_R * a_row_stride
    if HAS_DROPOUT:
        first, second = row_keys(seed_ptr, row, stream)
        acc = tl.where(kept(first[:, None], second[:, None], k[None, :], threshold), acc * scale, 0.0)
    dx_ptrs = dx_ptr + row[:, None] * dx_row_stride + k[None, :]
    mask = in_rows & in_columns
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + k, mask=k < in_features, other=0.0).to(tl.float32)[None, :]
    if ACCUMULATE:
        acc += tl.load(dx_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask)


_launch_up = Launcher(lora_up_bwd_kernel)
_launch_down_weight = Launcher(lora_down_bwd_weight_kernel)
_launch_down_input = Launcher(lora_down_bwd_input_kernel)


def lora_up_bwd(
    dy: Tensor, b: Tensor, s: Tensor, out: Tensor, *, rows: RowSlots | None = None, config: Config | None = None
) -> Tensor:
    """dS = dy @ b into `out`, and the partial sums of dy.T @ s, from one read of dy.

    Args:
        dy: (tokens, out_features), fp16 or bf16.
        b: (out_features, rank <= 16), or with `rows` (slots, out_features, rank), dtype of dy.
        s: (tokens, rank), dtype of dy.
        out: (tokens, rank) to fill, any floating dtype and strides.
        rows: of a mixed batch, each row of which reads the matrix of its slot.
        config: tile; the analytic default when None.

    Returns:
        (splits, out_features, rank) fp32; their sum over the first dimension is dy.T @ s. With `rows` (slots,
        out_features, rank), the sums.

    Raises:
        ValueError: a rank above the tile's.
    """
    (tokens, out_features), rank = dy.shape, b.shape[-1]
    config = config or default_config(UP, dy.device)
    if rank > config.block_r:
        raise ValueError(f"b: expected a rank of at most {config.block_r}, got {rank}")
    if dy.numel() == 0:
        out.zero_()
        return dy.new_zeros((1 if rows is None else rows.count, out_features, rank), dtype=torch.float32)
    blocks = cdiv(out_features, config.block_n)
    splits, each, table, starts = splits_of(tokens, blocks, config.block_m, dy.device, rows)
    dy, b, s = columns_contiguous(dy), columns_contiguous(b), columns_contiguous(s)
    ds = dy.new_empty((blocks, tokens, rank), dtype=torch.float32)
    db = dy.new_empty((splits, out_features, rank), dtype=torch.float32)
    _launch_up(
        dy.device, (blocks, splits),
        dy, b, s, ds, db, table,
        tokens, out_features, rank, each, dy.stride(0), *stack_strides(b)[:2], s.stride(0),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=config.ranks(rank),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    lora_sum(ds, out)
    return sums_of_slots(db, starts)


def lora_down_bwd_weight(
    x: Tensor,
    ds: Tensor,
    *,
    seed: Tensor | None = None,
    p: float = 0.0,
    stream: int = 0,
    features_first: bool = False,
    rows: RowSlots | None = None,
    config: Config | None = None,
) -> Tensor:
    """Partial sums over tokens of `ds.T @ dropout(x.to(ds.dtype))`: dA from X and dS, or dB from dY and S.

    Args:
        x: (tokens, features), fp16, bf16 or fp32.
        ds: (tokens, rank), likewise; its dtype is that of the product.
        seed, p, stream: of the dropout, as for `common.random.dropout`; none without a seed.
        features_first: lay the result out as (splits, features, rank).
        rows: of a mixed batch.
        config: tile; the analytic default when None.

    Returns:
        (splits, rank, features) fp32, or as `features_first` says; their sum over the first dimension is the product.
        With `rows` (slots, rank, features), the sums.
    """
    (tokens, features), rank = x.shape, ds.shape[1]
    shape = (features, rank) if features_first else (rank, features)
    if x.numel() == 0:
        return x.new_zeros((1 if rows is None else rows.count, *shape), dtype=torch.float32)
    config = config or default_config(WEIGHT, x.device)
    block_r = config.ranks(rank)
    blocks = cdiv(features, config.block_n) * cdiv(rank, block_r)
    splits, each, table, starts = splits_of(tokens, blocks, config.block_m, x.device, rows)
    x, ds = columns_contiguous(x), columns_contiguous(ds)
    out = x.new_empty((splits, *shape), dtype=torch.float32)
    strides = (out.stride(0), out.stride(2), out.stride(1)) if features_first else out.stride()
    drops = seed is not None and p > 0.0
    _launch_down_weight(
        x.device, (blocks, splits),
        x, ds, seed if drops else None, out, table,
        tokens, features, rank, each, x.stride(0), ds.stride(0), *strides,
        stream, keep_threshold(p) if drops else 0, 1.0 / (1.0 - p),
        HAS_DROPOUT=drops, BLOCK_M=config.block_m, BLOCK_K=config.block_n, BLOCK_R=block_r,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return sums_of_slots(out, starts)


def lora_down_bwd_input_(
    dx: Tensor,
    ds: Tensor,
    a: Tensor,
    *,
    seed: Tensor | None = None,
    p: float = 0.0,
    stream: int = 0,
    rows: RowSlots | None = None,
    bias: Tensor | None = None,
    accumulate: bool = True,
    config: Config | None = None,
) -> Tensor:
    """`dx += dropout(ds @ a) + bias`, in place; or Y = S B^T + bias of a mixed batch, with S for ds and B^T for a.

    Args:
        dx: (tokens, in_features), fp16, bf16 or fp32, columns contiguous.
        ds: (tokens, rank), likewise; its dtype is that of the product.
        a: (rank, in_features), or with `rows` (slots, rank, in_features), dtype of ds, any strides.
        seed, p, stream: of the dropout, as for `common.random.dropout`; none without a seed.
        rows: of a mixed batch, each row of which reads the matrix of its slot.
        bias: (in_features,), or None.
        accumulate: add to what is in `dx`; else it is written over.
        config: tile; the analytic default when None.

    Returns:
        `dx`.
    """
    (tokens, in_features), rank = dx.shape, a.shape[-2]
    if dx.numel() == 0:
        return dx
    config = config or default_config(INPUT, dx.device)
    ds = columns_contiguous(ds)
    drops = seed is not None and p > 0.0
    blocks = None if rows is None else rows.blocks(config.block_m, dx.device)
    count = cdiv(tokens, config.block_m) if blocks is None else blocks.shape[0]
    _launch_down_input(
        dx.device, (count * cdiv(in_features, config.block_n),),
        ds, a, dx, seed if drops else None, None if bias is None else bias.contiguous(), blocks,
        tokens, in_features, rank, ds.stride(0), *stack_strides(a), dx.stride(0),
        stream, keep_threshold(p) if drops else 0, 1.0 / (1.0 - p),
        HAS_DROPOUT=drops, ACCUMULATE=accumulate,
        BLOCK_M=config.block_m, BLOCK_K=config.block_n, BLOCK_R=config.ranks(rank),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    torch.autograd.graph.increment_version(dx)
    return dx


def columns_contiguous(tensor: Tensor) -> Tensor:
    """`tensor` as the kernels above read it. A gradient can be expanded: a sum's is one number."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
