"""Triton kernel for the gradients of a gated activation and, in the same pass, for what LoRA adapters beside it need.

dgate and dup are written; dB and dS of the gate's and the up projection's adapters and dA of the down projection's are
summed while they and h are in registers. h itself is never written.

Plan for 8192 x 14336, r = 16, bf16, at 4.3 TB/s, which the activation alone reaches on an H200. Measured there: the
separate kernels 606 us; this one 454, with three programs a multiprocessor 420, with 256 columns 1140.

| | MB | by its bytes | time |
|---|---|---|---|
| activation with h; lora_up_bwd twice; lora_down_bwd_weight | 1409 + 588 + 235 | 519 us | 337 + 216 + 66 us |
| one pass, 128 columns a program | 1174 + 235 + 39 of partial sums | 337 us | predicted 380 us |
| one pass, 256 columns a program | 1174 + 117 + 39 of partial sums | 310 us | predicted 400 us |

Partial sums are fp32, written and read: of dS for each block of columns, of dB and dA for each split of tokens. Twice
the columns halve those of dS, but their 3 * 16 * 256 accumulators leave room for one program a multiprocessor.

Compiled for sm_90 a step of silu takes 42 instructions an element at 16 x 128 and 50 at 16 x 256, of the 69 that an
H200 issues in the time of the bytes (132 SMs * 128 lanes * 1.755 GHz). 197 registers a thread leave room for two
programs of 4 warps with 12 KB of loads each under way; 168 for three, at the price of 13 spilled ones.

The next step's operands are loaded into registers meanwhile; see `fused_forward` for what else that is good for. No
product takes the result of another, and 16 ranks are too few rows for wgmma, so that the synchronous mma serves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation.triton_math import activate, gradient
from ..common.device import device_capability
from ..common.integers import cdiv
from ..common.launching import Launcher
from ..common.writes import count_writes
from ..lora.backward import columns_contiguous
from ..lora.partial_sums import lora_sum
from .fused import MAX_RANK
from .fused_tiles import Config, check_activation, check_factor, check_matrices, check_one_stride

# First the default. A limit of 255 is none, but keeps ptxas from spilling a few registers for a third program.
CONFIGS = (Config(16, 128, 4, 6, registers=255), Config(16, 128, 4, 6, registers=168))


def default_config(device: torch.device) -> Config:
    """The first; on Hopper the second, which spills some registers and is faster all the same.

    Measured on an H200 at 8192 x 14336, ranks 16, silu, bf16: 454 and 420 us.
    """
    return CONFIGS[1 if device_capability(device) == 90 else 0]


@triton.jit
def _rows(ptr, row, end, stride, features, m, n):
    """(BLOCK_M, BLOCK_N) of a matrix, from row `row` on; 0 from row `end` and column `features` on."""
    inside = (m < end - row)[:, None] & (n < features)[None, :]
    return tl.load(ptr + row * stride + (m[:, None] * stride + n[None, :]), mask=inside, other=0.0)


@triton.jit
def _ranks(ptr, row, end, stride, rank, m, r):
    """(BLOCK_R, BLOCK_M), transposed, of a matrix of `rank` columns, from row `row` on; 0 outside."""
    inside = (r < rank)[:, None] & (m < end - row)[None, :]
    return tl.load(ptr + row * stride + (m[None, :] * stride + r[:, None]), mask=inside, other=0.0)


@triton.jit
def _factor(ptr, block, stride, features, rank, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr):
    """Columns of B^T: (BLOCK_R, BLOCK_N), or (PARTS, BLOCK_R, BLOCK_N // PARTS)."""
    if PARTS == 1:
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        r = tl.arange(0, BLOCK_R)[:, None]
    else:
        WIDTH: tl.constexpr = BLOCK_N // PARTS
        n = block * BLOCK_N + (tl.arange(0, PARTS) * WIDTH)[:, None, None] + tl.arange(0, WIDTH)[None, None, :]
        r = tl.arange(0, BLOCK_R)[None, :, None]
    return tl.load(ptr + n.to(tl.int64) * stride + r, mask=(n < features) & (r < rank), other=0.0)


@triton.jit
def _over_columns(b, x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """(BLOCK_R, BLOCK_M), B^T times the transpose of x (BLOCK_M, BLOCK_N); b of `_factor`."""
    if PARTS == 1:
        product = tl.dot(b, tl.trans(x))
    else:
        apart = tl.permute(tl.reshape(x, (BLOCK_M, PARTS, BLOCK_N // PARTS)), (1, 2, 0))
        product = tl.sum(tl.dot(b, apart), 0)
    return product


@triton.jit(do_not_specialize=["tokens"])
def gated_activation_adapters_bwd_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    b_gate_ptr, s_gate_ptr, b_up_ptr, s_up_ptr, ds_down_ptr, ds_ptr, sums_ptr,
    tokens, features, split_tokens, gate_rank, up_rank, down_rank,
    dh_stride, pre_stride, dpre_stride, b_gate_stride, s_gate_stride, b_up_stride, s_up_stride, ds_down_stride,
    KIND: tl.constexpr, GATED: tl.constexpr,
    WITH_GATE: tl.constexpr, WITH_UP: tl.constexpr, WITH_DOWN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """dgate and dup in one block of columns and split of tokens, and its share of dS, dB and dA.

    Pointers, all with contiguous columns: dh, gate, up, dgate, dup (tokens, features), dgate and dup also where gate
    and up are; b_gate, b_up (features, rank); s_gate, s_up, ds_down (tokens, rank); ds fp32 (column blocks, tokens,
    gate_rank + up_rank); sums fp32 (splits, features, gate_rank + up_rank + down_rank), dA transposed. GATED: whether
    there is a gate; WITH_*: which projections have an adapter, else its rank is 0 and its pointers are not read.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    m, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    dtype = dup_ptr.dtype.element_ty
    first = split.to(tl.int64) * split_tokens
    end = tl.minimum(first + split_tokens, tokens)
    ds_rank = gate_rank + up_rank
    ds_ptr += block.to(tl.int64) * tokens * ds_rank

    next_dh = _rows(dh_ptr, first, end, dh_stride, features, m, n)
    next_up = _rows(up_ptr, first, end, pre_stride, features, m, n)
    if GATED:
        next_gate = _rows(gate_ptr, first, end, pre_stride, features, m, n)
    if WITH_GATE:
        next_s_gate = _ranks(s_gate_ptr, first, end, s_gate_stride, gate_rank, m, r)
        b_gate = _factor(b_gate_ptr, block, b_gate_stride, features, gate_rank, BLOCK_N, BLOCK_R, PARTS)
        db_gate = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    if WITH_UP:
        next_s_up = _ranks(s_up_ptr, first, end, s_up_stride, up_rank, m, r)
        b_up = _factor(b_up_ptr, block, b_up_stride, features, up_rank, BLOCK_N, BLOCK_R, PARTS)
        db_up = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    if WITH_DOWN:
        next_ds_down = _ranks(ds_down_ptr, first, end, ds_down_stride, down_rank, m, r)
        da_down = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)

    for row in range(first, end, BLOCK_M):
        ahead = row + BLOCK_M
        dh, up = next_dh.to(tl.float32), next_up.to(tl.float32)
        next_dh = _rows(dh_ptr, ahead, end, dh_stride, features, m, n)
        next_up = _rows(up_ptr, ahead, end, pre_stride, features, m, n)
        if GATED:
            gate = next_gate.to(tl.float32)
            next_gate = _rows(gate_ptr, ahead, end, pre_stride, features, m, n)
        if WITH_GATE:
            s_gate = next_s_gate
            next_s_gate = _ranks(s_gate_ptr, ahead, end, s_gate_stride, gate_rank, m, r)
        if WITH_UP:
            s_up = next_s_up
            next_s_up = _ranks(s_up_ptr, ahead, end, s_up_stride, up_rank, m, r)
        if WITH_DOWN:
            ds_down = next_ds_down
            next_ds_down = _ranks(ds_down_ptr, ahead, end, ds_down_stride, down_rank, m, r)

        inside = (m < end - row)[:, None] & (n < features)[None, :]
        dpre_offset = m[:, None] * dpre_stride + n[None, :]
        if GATED:
            value, slope = activate(gate, KIND, False)
            dgate = gradient(dh * up, gate, slope, KIND).to(dtype)
            dup = (dh * value).to(dtype)
            h = (value * up).to(dtype)
            tl.store(dgate_ptr + row * dpre_stride + dpre_offset, dgate, mask=inside)
        else:
            value, slope = activate(up, KIND, False)
            dup = gradient(dh, up, slope, KIND).to(dtype)
            h = value.to(dtype)
        tl.store(dup_ptr + row * dpre_stride + dpre_offset, dup, mask=inside)

        ds_ptrs = ds_ptr + row * ds_rank + (m[None, :] * ds_rank + r[:, None])
        in_rows = (m < end - row)[None, :]
        # dS before dB: the last product's layout, warps side by side along the columns, is what Triton gives them all.
        if WITH_GATE:
            ds = _over_columns(b_gate, dgate, BLOCK_M, BLOCK_N, PARTS)
            tl.store(ds_ptrs, ds, mask=in_rows & (r < gate_rank)[:, None])
            db_gate = tl.dot(s_gate, dgate, db_gate)
        if WITH_UP:
            ds = _over_columns(b_up, dup, BLOCK_M, BLOCK_N, PARTS)
            tl.store(ds_ptrs + gate_rank, ds, mask=in_rows & (r < up_rank)[:, None])
            db_up = tl.dot(s_up, dup, db_up)
        if WITH_DOWN:
            da_down = tl.dot(ds_down, h, da_down)

    sums_ptrs = sums_ptr + (split.to(tl.int64) * features + n[None, :]) * (ds_rank + down_rank) + r[:, None]
    in_columns = (n < features)[None, :]
    if WITH_GATE:
        tl.store(sums_ptrs, db_gate, mask=in_columns & (r < gate_rank)[:, None])
    if WITH_UP:
        tl.store(sums_ptrs + gate_rank, db_up, mask=in_columns & (r < up_rank)[:, None])
    if WITH_DOWN:
        tl.store(sums_ptrs + ds_rank, da_down, mask=in_columns & (r < down_rank)[:, None])


_launch = Launcher(gated_activation_adapters_bwd_kernel)


class UpAdapter(NamedTuple):
    """The second factor of an adapter, and what it multiplied in forward.

    Attributes:
        b: (features, rank), rank 1 to 16, any strides.
        s: (tokens, rank), any strides.
    """

    b: Tensor
    s: Tensor


class AdapterGradients(NamedTuple):
    """What `gated_activation_backward_with_adapters` returns; None, or no columns, for what has no adapter.

    Attributes:
        ds: dY B of the gate's adapter, then of up's, side by side: (tokens, gate_rank + up_rank), of the dtype of up.
        db_gate, db_up: (splits, features, rank) fp32; the sum over splits is dY^T S.
        da_down: (splits, rank, features) fp32; the sum over splits is dS^T h.
    """

    ds: Tensor
    db_gate: Tensor | None
    db_up: Tensor | None
    da_down: Tensor | None


def gated_activation_backward_with_adapters(
    dh: Tensor,
    gate: Tensor | None,
    up: Tensor,
    activation: str,
    *,
    dgate: Tensor | None,
    dup: Tensor,
    gate_adapter: UpAdapter | None = None,
    up_adapter: UpAdapter | None = None,
    ds_down: Tensor | None = None,
    config: Config | None = None,
) -> AdapterGradients:
    """Gradients of `gated_activation_with_down`'s h, and the adapters' products with them, from one pass.

    Equivalent PyTorch, with a = act(gate): `dgate = dh * up * act'(gate)`, `dup = dh * a`, `h = a * up`; without a gate
    `dup = dh * act'(up)`, `h = act(up)`. Then `dgate @ gate_adapter.b`, `dgate.T @ gate_adapter.s`, the same of up, and
    `ds_down.T @ h`, of the rounded dgate, dup and h. The same bits every time.

    The partial sums that are returned are views of one tensor; `lora.partial_sums.lora_sum` adds them.

    Args:
        dh: (tokens, features), fp16 or bf16, the gradient of h; columns contiguous.
        gate, up: as dh, rows of both equally far apart; gate is None where there is none.
        activation: one of `activation.KINDS`.
        dgate, dup: as gate and up; filled. They may be the very tensors gate and up. dgate is None when gate is.
        gate_adapter, up_adapter: of the projections that gave gate and up; None without one, or when it is frozen.
        ds_down: (tokens, rank), rank 1 to 16, any strides: dY B of the down projection's adapter; None likewise.
        config: tile; that of `default_config` when None.

    Returns:
        What the adapters need; see there.

    Raises:
        TypeError: not all fp16, or not all bf16.
        ValueError: any other argument is not as above.
    """
    config = config or default_config(up.device)
    check_activation(activation)
    matrices = {"up": up, "dh": dh, "gate": gate, "dgate": dgate, "dup": dup}
    check_matrices(matrices, config, gated_activation_adapters_bwd_kernel)
    check_one_stride("gate and up", gate, up)
    check_one_stride("dgate and dup", dgate, dup)
    if (gate is None) != (dgate is None):
        raise ValueError(
            f"dgate: expected {'None' if gate is None else 'a tensor'} as gate is, "
            f"got {'None' if dgate is None else 'a tensor'}"
        )
    if gate is None and gate_adapter is not None:
        raise ValueError("gate_adapter: expected None without a gate, got an adapter")
    tokens, features = up.shape
    factors: list[Tensor | None] = []
    ranks = []
    for name, adapter in (("gate_adapter", gate_adapter), ("up_adapter", up_adapter)):
        if adapter is not None:
            check_factor(f"{name}.b", adapter.b, features, up)
            check_factor(f"{name}.s", adapter.s, tokens, up, adapter.b.shape[1])
        factors += [None, None] if adapter is None else [columns_contiguous(t) for t in adapter]
        ranks.append(0 if adapter is None else adapter.b.shape[1])
    if ds_down is not None:
        check_factor("ds_down", ds_down, tokens, up)
        ds_down = columns_contiguous(ds_down)
    factors.append(ds_down)
    ranks.append(0 if ds_down is None else ds_down.shape[1])
    blocks = max(1, cdiv(features, config.block_n))
    splits, each = config.splits(max(tokens, 1), config.block_m, blocks, up.device)
    ds = up.new_empty((tokens, sum(ranks[:2])))
    make = up.new_empty if up.numel() else up.new_zeros
    sums = make((splits, features, sum(ranks)), dtype=torch.float32)
    if up.numel() == 0:
        return _returned(ds.zero_(), sums, ranks)
    partial = up.new_empty((blocks, tokens, sum(ranks[:2])), dtype=torch.float32)
    _launch(
        up.device, (blocks, splits), dh, gate, up, dgate, dup, *factors, partial, sums,
        tokens, features, each, *ranks, dh.stride(0), up.stride(0), dup.stride(0),
        *[0 if factor is None else factor.stride(0) for factor in factors],
        KIND=activation, GATED=gate is not None,
        WITH_GATE=ranks[0] > 0, WITH_UP=ranks[1] > 0, WITH_DOWN=ranks[2] > 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=MAX_RANK, PARTS=config.parts,
        num_warps=config.num_warps, num_stages=1, maxnreg=config.registers,
    )  # fmt: skip
    count_writes(dgate, dup)
    return _returned(lora_sum(partial, ds), sums, ranks)


def _returned(ds: Tensor, sums: Tensor, ranks: list[int]) -> AdapterGradients:
    db_gate, db_up, da_down = (part if part.shape[2] else None for part in sums.split(ranks, dim=2))
    return AdapterGradients(ds, db_gate, db_up, None if da_down is None else da_down.transpose(1, 2))
