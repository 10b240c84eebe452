"""Triton kernel for h = act(gate) * up and S = h A^T in one pass: what the down projection's adapter reads of h.

Plan for 8192 x 14336, r = 16, bf16, at 4.3 TB/s, which the activation alone reaches on an H200.

| | MB | time |
|---|---|---|
| activation, then lora_down_fwd | 705 + 235 | 165 + 66 us, measured |
| one pass | 705 + 2 of partial sums | 164 us by its bytes, predicted 180, measured 191 us |

A program walks along the columns of a block of tokens, so that S stays in registers; the columns are cut into splits,
two here, only to fill the device. Each block of tokens reads all of A from the second-level cache: 117 MB at 32 tokens.

The next step's operands are loaded into registers while this one's are worked on. That a value comes from the step
before also keeps Triton from what it would else do: move the change of layout that a product needs up to the loads, and
compute the activation anew for each layout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activation.triton_math import activate
from ..common.device import device_capability
from ..common.integers import cdiv
from ..common.launching import Launcher
from ..common.writes import count_writes
from ..lora.backward import columns_contiguous
from ..lora.partial_sums import lora_sum
from .fused import MAX_RANK
from .fused_tiles import Config, check_activation, check_factor, check_matrices, check_one_stride

CONFIGS = (Config(32, 128, 8, 4), Config(32, 256, 8, 4), Config(16, 128, 4, 8))


def default_config(device: torch.device) -> Config:
    """The first; on Hopper the second, which spills some registers on other GPUs.

    Measured on an H200 at 8192 x 14336, rank 16, silu, bf16: 218 and 191 us.
    """
    return CONFIGS[1 if device_capability(device) == 90 else 0]


@triton.jit
def _columns(ptr, offset, n, end, inside):
    """(rows, BLOCK_N) from column n[0] on; 0 from column `end` on and in rows that are not `inside`."""
    return tl.load(ptr + (offset + n[None, :]), mask=inside & (n < end)[None, :], other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def gated_activation_down_fwd_kernel(
    gate_ptr, up_ptr, h_ptr, a_ptr, s_ptr,
    tokens, features, split_features, rank,
    pre_stride, h_stride, a_stride,
    KIND: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h in one block of tokens and split of columns, and that split's share of S = h A^T.

    gate_ptr, up_ptr, h_ptr: (tokens, features), columns contiguous; h may lie where gate or up does. a_ptr: (rank,
    features), columns contiguous. s_ptr: fp32 (splits, tokens, rank). GATED: whether there is a gate.
    """
    split = tl.program_id(1)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    m, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    in_rows, in_rank = m < tokens - first_row, r < rank
    up_ptr += first_row * pre_stride
    h_ptr += first_row * h_stride
    pre_offset, h_offset, a_offset = m[:, None] * pre_stride, m[:, None] * h_stride, r[:, None] * a_stride
    first = split * split_features
    end = tl.minimum(first + split_features, features)
    n = first + tl.arange(0, BLOCK_N)
    next_up = _columns(up_ptr, pre_offset, n, end, in_rows[:, None])
    next_a = _columns(a_ptr, a_offset, n, end, in_rank[:, None])
    if GATED:
        gate_ptr += first_row * pre_stride
        next_gate = _columns(gate_ptr, pre_offset, n, end, in_rows[:, None])
    acc = tl.zeros((BLOCK_R, BLOCK_M), dtype=tl.float32)
    for _ in range(first, end, BLOCK_N):
        up, a = next_up.to(tl.float32), next_a
        next_up = _columns(up_ptr, pre_offset, n + BLOCK_N, end, in_rows[:, None])
        next_a = _columns(a_ptr, a_offset, n + BLOCK_N, end, in_rank[:, None])
        if GATED:
            gate = next_gate.to(tl.float32)
            next_gate = _columns(gate_ptr, pre_offset, n + BLOCK_N, end, in_rows[:, None])
            value, _ = activate(gate, KIND, False)
            h = (value * up).to(h_ptr.dtype.element_ty)
        else:
            value, _ = activate(up, KIND, False)
            h = value.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + (h_offset + n[None, :]), h, mask=in_rows[:, None] & (n < end)[None, :])
        acc = tl.dot(a, tl.trans(h), acc)
        n += BLOCK_N
    s_ptrs = s_ptr + (split.to(tl.int64) * tokens + first_row + m[None, :]) * rank + r[:, None]
    tl.store(s_ptrs, acc, mask=in_rank[:, None] & in_rows[None, :])


_launch = Launcher(gated_activation_down_fwd_kernel)


def gated_activation_with_down(
    gate: Tensor | None, up: Tensor, activation: str, h: Tensor, a: Tensor, *, config: Config | None = None
) -> Tensor:
    """h = act(gate) * up, and S = h A^T, from one pass over gate and up.

    Equivalent PyTorch: `h = act(gate) * up; return h @ a.T`; without a gate `h = act(up)`. h is rounded before it is
    multiplied. The same bits every time.

    Args:
        gate: (tokens, features), fp16 or bf16, or None. Columns are contiguous; rows as far apart as those of `up`.
        up: as gate.
        activation: one of `activation.KINDS`.
        h: as up, rows any distance apart; filled. It may be the very tensor `gate` or `up`.
        a: (rank, features), rank 1 to 16, of the dtype of up, any strides.
        config: tile; that of `default_config` when None.

    Returns:
        S, (tokens, rank), of the dtype of h.

    Raises:
        TypeError: not all fp16, or not all bf16.
        ValueError: any other argument is not as above.
    """
    config = config or default_config(up.device)
    check_activation(activation)
    check_matrices({"up": up, "gate": gate, "h": h}, config, gated_activation_down_fwd_kernel)
    check_one_stride("gate and up", gate, up)
    (tokens, features), rank = up.shape, a.shape[0]
    check_factor("a.T", a.t(), features, up)
    s = up.new_empty((tokens, rank))
    if up.numel() == 0:
        return s.zero_()
    a = columns_contiguous(a)
    blocks = cdiv(tokens, config.block_m)
    splits, each = config.splits(features, config.block_n, blocks, up.device)
    partial = up.new_empty((splits, tokens, rank), dtype=torch.float32)
    _launch(
        up.device, (blocks, splits), gate, up, h, a, partial,
        tokens, features, each, rank, up.stride(0), h.stride(0), a.stride(0),
        KIND=activation, GATED=gate is not None,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=MAX_RANK,
        num_warps=config.num_warps, num_stages=1, maxnreg=config.registers,
    )  # fmt: skip
    count_writes(h)
    return lora_sum(partial, s)
