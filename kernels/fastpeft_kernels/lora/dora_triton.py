"""Triton kernels of DoRA: norms of the adapted rows from one read of W, the gain's backward from one read of dY.

Plan at 3.3 TB/s, 8192 tokens, 4096 to 4096 features, r = 16, bf16; no GPU has measured it yet:

| kernel | MB | floor | beside |
|---|---|---|---|
| dora_norms | 34 | 10 us | PEFT's some 8 passes over matrices of W's shape, in fp32 0.5 GB |
| dora_gain_bwd (dz and the gain's gradient) | 201 | 61 us | dy * gain, dy * z and its sum apart: 403 MB |
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv, next_power_of_2
from ..common.launching import Launcher
from .backward import columns_contiguous
from .configs import token_splits
from .partial_sums import lora_sum

NORMS = {"BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}
GAIN = {"BLOCK_M": 32, "BLOCK_N": 256, "num_warps": 8}


@triton.jit
def dora_norms_kernel(
    w_ptr, up_ptr, a_ptr, norms_ptr,
    out_features, in_features, rank,
    w_row_stride, up_row_stride, a_row_stride,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Norms of BLOCK_N rows of W + up A, the sum made tile by tile in registers."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k, r = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    in_rows = (n < out_features)[:, None]
    w_ptrs = w_ptr + n[:, None] * w_row_stride + k[None, :]
    up_ptrs = up_ptr + n[:, None] * up_row_stride + r[None, :]
    a_ptrs = a_ptr + r[:, None].to(tl.int64) * a_row_stride + k[None, :]
    squares = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k0 in range(0, in_features, BLOCK_K):
        in_columns = (k < in_features - k0)[None, :]
        t = tl.load(w_ptrs + k0, mask=in_rows & in_columns, other=0.0).to(tl.float32)
        a_block = a_ptrs + k0
        for r0 in range(0, rank, BLOCK_R):
            up = tl.load(up_ptrs + r0, mask=in_rows & (r < rank - r0)[None, :], other=0.0)
            a = tl.load(a_block, mask=in_columns & (r < rank - r0)[:, None], other=0.0)
            t = tl.dot(up, a, t, input_precision="ieee")
            a_block += BLOCK_R * a_row_stride
        squares += tl.sum(t * t, axis=1)
    tl.store(norms_ptr + n, tl.sqrt(squares), mask=n < out_features)


@triton.jit(do_not_specialize=["tokens"])
def dora_gain_bwd_kernel(
    dy_ptr, z_ptr, gain_ptr, dz_ptr, sums_ptr,
    tokens, out_features, split_tokens,
    dy_row_stride, z_row_stride, dz_row_stride,
    HAS_Z: tl.constexpr, HAS_DZ: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dZ = gain dY, and sums over the tokens of one split of dY * Z, fp32 (splits, out_features)."""
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = n < out_features
    gain = tl.load(gain_ptr + n, mask=in_columns, other=0.0)[None, :]
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    row = split.to(tl.int64) * split_tokens + tl.arange(0, BLOCK_M)  # split_tokens is a multiple of BLOCK_M
    for _ in range(0, split_tokens // BLOCK_M):
        mask = (row < tokens)[:, None] & in_columns[None, :]
        dy = tl.load(dy_ptr + row[:, None] * dy_row_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_Z:
            z = tl.load(z_ptr + row[:, None] * z_row_stride + n[None, :], mask=mask, other=0.0)
            acc += tl.sum(dy * z.to(tl.float32), axis=0)
        if HAS_DZ:
            dz_ptrs = dz_ptr + row[:, None] * dz_row_stride + n[None, :]
            tl.store(dz_ptrs, (dy * gain).to(dz_ptr.dtype.element_ty), mask=mask)
        row += BLOCK_M
    if HAS_Z:
        tl.store(sums_ptr + split.to(tl.int64) * out_features + n, acc, mask=in_columns)


_launch_norms = Launcher(dora_norms_kernel)
_launch_gain = Launcher(dora_gain_bwd_kernel)


def row_norms_triton(w: Tensor, up: Tensor, a: Tensor) -> Tensor:
    """`dora.row_norms` in one launch: fp16, bf16 or fp32, up and a of one dtype; the norms are fp32."""
    (out_features, in_features), rank = w.shape, a.shape[0]
    norms = w.new_empty(out_features, dtype=torch.float32)
    if out_features == 0:
        return norms
    w, up, a = columns_contiguous(w), columns_contiguous(up), columns_contiguous(a)
    _launch_norms(
        w.device, (cdiv(out_features, NORMS["BLOCK_N"]),),
        w, up, a, norms, out_features, in_features, rank, w.stride(0), up.stride(0), a.stride(0),
        BLOCK_R=norms_ranks(rank), **NORMS,
    )  # fmt: skip
    return norms


def norms_ranks(rank: int) -> int:
    """Ranks of one product: 16 is the fewest that tensor cores have; of 64 in fp32 there are not enough registers."""
    return min(32, max(16, next_power_of_2(rank)))


def gain_backward_triton(dy: Tensor, z: Tensor | None, gain: Tensor, dz: Tensor | None) -> Tensor | None:
    """`dora.gain_backward` from one read of dy; fp16, bf16 or fp32, gain fp32. At least one of z and dz is there."""
    tokens, out_features = dy.shape
    if dy.numel() == 0:
        return None if z is None else torch.zeros_like(gain)
    blocks = cdiv(out_features, GAIN["BLOCK_N"])
    splits, each = token_splits(tokens, blocks, GAIN["BLOCK_M"], dy.device)
    dy, z = columns_contiguous(dy), None if z is None else columns_contiguous(z)
    sums = None if z is None else gain.new_empty((splits, 1, out_features))
    _launch_gain(
        dy.device, (blocks, splits),
        dy, z, gain, dz, sums, tokens, out_features, each,
        dy.stride(0), 0 if z is None else z.stride(0), 0 if dz is None else dz.stride(0),
        HAS_Z=z is not None, HAS_DZ=dz is not None, **GAIN,
    )  # fmt: skip
    return None if sums is None else lora_sum(sums, gain.new_empty((1, out_features)))[0]
