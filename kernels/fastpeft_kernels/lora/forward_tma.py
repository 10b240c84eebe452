"""The large product of forward and of dX through Hopper's and Blackwell's tensor descriptors (TMA).

Same result and same plan as `lora_linear_fwd_kernel`: the copy engine computes the addresses, so that the loop keeps no
pointers (154 registers instead of 186 on sm_90), four stages of 48 KiB fit, and ragged edges need no masks. Such
kernels reach 92 to 102 % of cuBLAS in the Gluon tutorial on Hopper, pointer kernels about 85 %: only this variant can
save more than the 28 us that the fused update is worth. Not yet measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config


@triton.jit(do_not_specialize=["tokens"])
def lora_linear_tma_fwd_kernel(
    x_desc, w_desc, s_desc, b_desc, y_desc, bias_ptr,
    tokens, out_features, in_features, rank,
    W_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Y = (Y) + X W^T + S B^T + bias; descriptors fill with zeros past the ends and write nothing there."""
    down, across = tl.cdiv(tokens, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * across)
    size = tl.minimum(down - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * across)
    m = (group * GROUP_M + within % size) * BLOCK_M
    n = (within // size) * BLOCK_N
    if ACCUMULATE:
        acc = y_desc.load([m, n]).to(tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
        x = x_desc.load([m, k])
        if W_TRANSPOSED:
            w = w_desc.load([k, n])
        else:
            w = w_desc.load([n, k]).T
        acc = tl.dot(x, w, acc)
    if HAS_LORA:
        for r in tl.range(0, rank, BLOCK_R, num_stages=1):
            s = s_desc.load([m, r])
            if B_TRANSPOSED:
                b = b_desc.load([r, n])
            else:
                b = b_desc.load([n, r]).T
            acc = tl.dot(s, b, acc)
    if HAS_BIAS:
        at = n + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + at, mask=at < out_features, other=0.0).to(tl.float32)[None, :]
    y_desc.store([m, n], acc.to(y_desc.dtype))


def describable(x: Tensor, w: Tensor, out: Tensor, s: Tensor | None = None, b: Tensor | None = None) -> bool:
    """Whether these operands of `lora_linear` can have descriptors: one 16-bit dtype (but of `out`), aligned rows."""
    if any(t.dtype != x.dtype for t in (w, s, b) if t is not None) or x.dtype.itemsize != 2:
        return False
    views = (x, _rows_view(w), out, s, None if b is None else _rows_view(b))
    return all(_aligned(view) for view in views if view is not None)


def lora_linear_tma(
    x: Tensor,
    w: Tensor,
    s: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
    config: Config,
) -> Tensor:
    """`lora_linear` for describable operands; see there.

    Raises:
        ValueError: an operand cannot have a descriptor.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    if not describable(x, w, out, s, b):
        raise ValueError("operands: expected one 16-bit dtype, rows at multiples of 16 bytes and contiguous columns")
    rank = 0 if s is None or b is None else s.shape[1]
    block_r = config.ranks(rank) if rank else 16

    def describe(tensor: Tensor | None, rows: int, columns: int) -> TensorDescriptor | None:
        if tensor is None:
            return None
        block = [rows, columns] if tensor.stride(1) == 1 else [columns, rows]
        return TensorDescriptor.from_tensor(_rows_view(tensor), block)

    programs = triton.cdiv(x.shape[0], config.block_m) * triton.cdiv(w.shape[0], config.block_n)
    with torch.cuda.device_of(x):
        lora_linear_tma_fwd_kernel[(programs,)](
            describe(x, config.block_m, config.block_k), describe(w, config.block_n, config.block_k),
            describe(s, config.block_m, block_r), describe(b, config.block_n, block_r),
            describe(out, config.block_m, config.block_n), None if bias is None else bias.contiguous(),
            x.shape[0], w.shape[0], x.shape[1], rank,
            W_TRANSPOSED=w.stride(1) != 1, B_TRANSPOSED=b is not None and b.stride(1) != 1,
            HAS_LORA=rank > 0, HAS_BIAS=bias is not None, ACCUMULATE=accumulate,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=block_r, GROUP_M=8,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out


def _rows_view(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.t()


def _aligned(tensor: Tensor) -> bool:
    size = tensor.dtype.itemsize
    return (
        tensor.numel() > 0
        and tensor.stride(1) == 1
        and tensor.stride(0) * size % 16 == 0
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.data_ptr() % 16 == 0
        and tensor.shape[0] < 2**31
    )
