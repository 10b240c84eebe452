"""Triton kernels of the forward pass: S = dropout(X) A^T, and Y = X W^T + S B^T + bias in one accumulator.

Plan for M = 8192 tokens, K = N = 4096, r = 16, bf16, at 700 TFLOP/s and 4.8 TB/s, and what an H200 took.

| kernel | GFLOP | MB | floor | predicted | measured | why |
|---|---|---|---|---|---|---|
| lora_down_fwd | 1.07 | 67.5 | 14 us | 17 us | 27 us | reads X once, as cuBLAS does in 27 us |
| the same with dropout | 1.07 | 67.5 | 28 us | 32 us | 38 us | 12 integer instructions an element (`triton_random`) |
| lora_linear_fwd | 276 | 168 | 394 us | 430 us | 460 us | + 0.4 % work for the update; Y is written once |

The library's product takes 340 us there, 374 with the update written first; `forward_tma` takes 348 with it. Each
adapter with dropout of its own is a launch of its own: the integer instructions are the cost, so reading X once for
several masks would save nothing.

The down kernel computes S^T = A X^T: the operand that dropout changes in registers is then the second one, which wgmma
takes from shared memory only. With S = X A^T it would be wgmma's register operand, which ptxas before 13.3 miscompiles.
Up to rank 32 there are too few rows for wgmma, so that the synchronous mma serves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv
from ..common.launching import Launcher
from ..common.random import keep_threshold
from ..common.triton_random import kept, row_keys
from .configs import DOWN, Config, default_config, linear_config
from .forward_tma import describable, lora_linear_tma
from .mixed_rows import RowSlots


@triton.jit
def block_of_row(blocks_ptr, block):
    """(first token, the end of its block, slot) of a line of `RowSlots.blocks` or `splits`."""
    first = tl.load(blocks_ptr + 3 * block).to(tl.int64)
    slot = tl.load(blocks_ptr + 3 * block + 2).to(tl.int64)
    return first, tl.load(blocks_ptr + 3 * block + 1), slot


@triton.jit(do_not_specialize=["tokens", "stream", "threshold"])
def lora_down_fwd_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr, blocks_ptr,
    tokens, in_features, rank,
    x_row_stride, x_column_stride, a_slot_stride, a_row_stride, a_column_stride, s_row_stride, s_column_stride,
    stream, threshold, scale,
    HAS_DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """S^T = scale * A keep(X)^T; one program a block of tokens and of ranks, ranks fastest.

    In a mixed batch the blocks of tokens, and whose A each reads, are those of `RowSlots.blocks`; else blocks_ptr is
    None.
    """
    across = tl.cdiv(rank, BLOCK_R)
    block = tl.program_id(0) // across
    if blocks_ptr is None:
        first_row, end = block.to(tl.int64) * BLOCK_M, tokens
    else:
        first_row, end, slot = block_of_row(blocks_ptr, block)
        a_ptr += slot * a_slot_stride
    row = first_row + tl.arange(0, BLOCK_M)
    r = (tl.program_id(0) % across) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    inside = tl.minimum(row, end - 1)  # rows past the end repeat the last one and are not stored
    in_rank = (r < rank)[:, None]
    x_ptrs = x_ptr + inside[None, :] * x_row_stride + k[:, None].to(tl.int64) * x_column_stride
    a_ptrs = a_ptr + r[:, None].to(tl.int64) * a_row_stride + k[None, :].to(tl.int64) * a_column_stride
    acc = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)
    if HAS_DROPOUT:
        first, second = row_keys(seed_ptr, row, stream)
    for k0 in range(0, in_features, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            a = tl.load(a_ptrs, mask=in_rank, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=(k < in_features - k0)[:, None], other=0.0)
            a = tl.load(a_ptrs, mask=in_rank & (k < in_features - k0)[None, :], other=0.0)
        x = x.to(a.dtype)
        if HAS_DROPOUT:
            x = tl.where(kept(first[None, :], second[None, :], (k + k0)[:, None], threshold), x, 0.0)
        acc = tl.dot(a, x, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * x_column_stride
        a_ptrs += BLOCK_K * a_column_stride
    if HAS_DROPOUT:
        acc *= scale
    s_ptrs = s_ptr + row[None, :] * s_row_stride + r[:, None] * s_column_stride
    tl.store(s_ptrs, acc.to(s_ptr.dtype.element_ty), mask=in_rank & (row < end)[None, :])


@triton.jit
def _inside(index, size, BLOCK: tl.constexpr):
    """`index` with 0 for what is past the end. The hint is untrue only there, where the results are dropped."""
    return tl.max_contiguous(tl.multiple_of(tl.where(index < size, index, 0), BLOCK), BLOCK)


@triton.jit(do_not_specialize=["tokens"])
def lora_linear_fwd_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, bias_ptr, y_ptr,
    tokens, out_features, in_features, rank,
    x_row_stride, x_column_stride, w_row_stride, w_column_stride,
    s_row_stride, s_column_stride, b_row_stride, b_column_stride, y_row_stride,
    HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Y = (Y) + X W^T + S B^T + bias; programs in groups of GROUP_M row blocks, for the second-level cache."""
    down, across = tl.cdiv(tokens, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * across)
    size = tl.minimum(down - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * across)
    row = (group * GROUP_M + within % size).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // size).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_load, n_load = _inside(row, tokens, BLOCK_M), _inside(n, out_features, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m_load[:, None] * x_row_stride + k[None, :].to(tl.int64) * x_column_stride
    w_ptrs = w_ptr + n_load[None, :] * w_row_stride + k[:, None].to(tl.int64) * w_column_stride
    y_ptrs = y_ptr + row[:, None] * y_row_stride + n[None, :]
    mask = (row < tokens)[:, None] & (n < out_features)[None, :]
    if ACCUMULATE:  # before the loop: after it no registers are left
        acc = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, in_features, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k < in_features - k0)[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=(k < in_features - k0)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * x_column_stride
        w_ptrs += BLOCK_K * w_column_stride
    if HAS_LORA:
        r = tl.arange(0, BLOCK_R)
        s_ptrs = s_ptr + m_load[:, None] * s_row_stride + r[None, :] * s_column_stride
        b_ptrs = b_ptr + n_load[None, :] * b_row_stride + r[:, None].to(tl.int64) * b_column_stride
        for r0 in tl.range(0, rank, BLOCK_R, num_stages=1):
            s = tl.load(s_ptrs, mask=(r < rank - r0)[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=(r < rank - r0)[:, None], other=0.0)
            acc = tl.dot(s, b, acc, input_precision="ieee")
            s_ptrs += BLOCK_R * s_column_stride
            b_ptrs += BLOCK_R * b_column_stride
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n_load).to(tl.float32)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


_launch_down = Launcher(lora_down_fwd_kernel)
_launch_linear = Launcher(lora_linear_fwd_kernel)


def lora_down(
    x: Tensor,
    a: Tensor,
    *,
    seed: Tensor | None = None,
    p: float = 0.0,
    stream: int = 0,
    out: Tensor | None = None,
    rows: RowSlots | None = None,
    config: Config | None = None,
) -> Tensor:
    """`dropout(x.to(a.dtype)) @ a.T` from one read of x.

    Args:
        x: (tokens, in_features), fp16, bf16 or fp32, any strides.
        a: (rank, in_features), likewise, or with `rows` (slots, rank, in_features); its dtype is that of the product.
        seed, p, stream: of the dropout, as for `common.random.dropout`; none without a seed.
        out: (tokens, rank) to fill, any strides; a new tensor of a's dtype by default.
        rows: of a mixed batch, each row of which reads the matrix of its slot.
        config: tile; the analytic default when None.

    Returns:
        `out`.
    """
    (tokens, in_features), rank = x.shape, a.shape[-2]
    out = a.new_empty((tokens, rank)) if out is None else out
    if out.numel() == 0:
        return out
    config = config or default_config(DOWN, x.device)
    block_r = config.ranks(rank)
    drops = seed is not None and p > 0.0
    blocks = None if rows is None else rows.blocks(config.block_m, x.device)
    count = cdiv(tokens, config.block_m) if blocks is None else blocks.shape[0]
    _launch_down(
        x.device, (count * cdiv(rank, block_r),),
        x, a, out, seed if drops else None, blocks,
        tokens, in_features, rank, *x.stride(), *stack_strides(a), *out.stride(),
        stream, keep_threshold(p) if drops else 0, 1.0 / (1.0 - p),
        HAS_DROPOUT=drops, EVEN_K=in_features % config.block_k == 0,
        BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_R=block_r,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def stack_strides(matrices: Tensor) -> tuple[int, ...]:
    """(slot, row, column) of a stack; of one matrix, with 0 for its slot."""
    return (*[0] * (3 - matrices.dim()), *matrices.stride())


def lora_linear(
    x: Tensor,
    w: Tensor,
    s: Tensor | None = None,
    b: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    more: Sequence[tuple[Tensor, Tensor]] = (),
    out: Tensor | None = None,
    accumulate: bool = False,
    config: Config | None = None,
) -> Tensor:
    """`x @ w.T + s @ b.T + bias`, all in one fp32 accumulator, rounded once.

    Args:
        x: (tokens, in_features), fp16, bf16 or fp32, any strides.
        w: (out_features, in_features), dtype of x, any strides: a transposed view serves for dY W.
        s: (tokens, rank) or None, any strides.
        b: (out_features, rank), dtype of s, any strides; None without s.
        bias: (out_features,), any floating dtype, or None.
        more: further pairs of x and w, whose products are added: in the same accumulator where tensor descriptors
            serve, else into `out`, one after the other.
        out: (tokens, out_features) to fill, any floating dtype, columns contiguous; a new tensor like x by default.
        accumulate: add to what is in `out`.
        config: tile; the analytic default when None.

    Returns:
        `out`.

    Raises:
        ValueError: a config with `tma`, and an operand that cannot have a descriptor.
    """
    (tokens, in_features), out_features = x.shape, w.shape[0]
    out = x.new_empty((tokens, out_features)) if out is None else out
    if out.numel() == 0:
        return out
    pairs = [(x, w), *more]
    described = (config is None or config.tma) and describable(pairs, out, s, b)
    config = config or linear_config(x.device, x.dtype, described)
    if config.tma:
        if not described:
            raise ValueError(
                "operands: expected one 16-bit dtype, rows at multiples of 16 bytes and contiguous columns"
            )
        return lora_linear_tma(pairs, s, b, bias, out, accumulate, config)
    rank = 0 if s is None else s.shape[1]
    no_strides = (0, 0)
    _launch_linear(
        x.device, (cdiv(tokens, config.block_m) * cdiv(out_features, config.block_n),),
        x, w, s, b, None if bias is None else bias.contiguous(), out,
        tokens, out_features, in_features, rank, *x.stride(), *w.stride(),
        *(no_strides if s is None else s.stride()), *(no_strides if b is None else b.stride()), out.stride(0),
        HAS_LORA=rank > 0, HAS_BIAS=bias is not None, ACCUMULATE=accumulate,
        EVEN_K=in_features % config.block_k == 0, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, BLOCK_R=16 if s is None or s.dtype == torch.float32 else config.ranks(rank),
        GROUP_M=8, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    for another_x, another_w in more:
        lora_linear(another_x, another_w, out=out, accumulate=True, config=config)
    return out
