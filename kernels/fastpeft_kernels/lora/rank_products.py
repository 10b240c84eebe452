"""Products with one side of rank width, bound by reading the other: by BLAS, in C++ on a CPU, or in Triton on a GPU.

On CPUs BLAS runs them far below its rate. Measured on an EPYC with AVX2, one thread, fp32, 1024 tokens, C++ / MKL,
least of 40 interleaved: dY B and dY^T S at rank 8 together 0.22 and 0.15 (768 and 2048 features), at rank 16 0.75 and
0.43, at 32 0.88 and 0.66, at 64 1.01 and 0.73; X A^T at rank 16 0.82 and 0.65. For dA = dS^T X MKL was as fast up to
768 features, so it stays there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.device import device_capability
from ..native import skinny, skinny_serves
from ..tuning.choosing import choice
from .keys import RANK, rank_backends, rank_key


def project_down(y: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """y factor, of y (tokens, features) and factor (features, rank)."""
    if _triton_serves(y, factor):
        from .forward import lora_down

        return lora_down(y, factor.t(), out=out)
    if not skinny_serves(y, factor):
        return torch.mm(y, factor, out=out)
    if out is None:
        out = y.new_empty((y.shape[0], factor.shape[1]))
    skinny(y, b=factor, ds=out)
    return out


def up_gradient(dy: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T s, (features, rank); dy (tokens, features), s (tokens, rank), `dtype` that of the parameter."""
    if _triton_serves(dy, s):
        from .backward import lora_down_bwd_weight, lora_sum

        return lora_sum(lora_down_bwd_weight(dy, s, features_first=True), _empty(dy, s, dtype))
    if not skinny_serves(dy, s):
        return _mm_wide(dy.t(), s, dtype)
    out = dy.new_empty((dy.shape[1], s.shape[1]))
    skinny(dy, s=s, db=out)
    return out


def both_gradients(dy: Tensor, b: Tensor, s: Tensor, ds: Tensor, dtype: torch.dtype) -> Tensor:
    """Fills ds with dy b and returns dy^T s, from one read of dy where it can be had."""
    if _triton_serves(dy, b, s, ds):
        from .backward import lora_sum, lora_up_bwd
        from .configs import UP

        if b.shape[1] <= UP[0].block_r:
            return lora_sum(lora_up_bwd(dy, b, s, ds), _empty(dy, s, dtype))
    if not skinny_serves(dy, b, s, ds):
        project_down(dy, b, out=ds)
        return up_gradient(dy, s, dtype)
    out = dy.new_empty((dy.shape[1], s.shape[1]))
    skinny(dy, b=b, ds=ds, s=s, db=out)
    return out


def down_gradient(ds: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """ds^T x, (rank, features); ds (tokens, rank), x (tokens, features), `dtype` that of the parameter."""
    if _triton_serves(x, ds):
        from .backward import lora_down_bwd_weight, lora_sum

        return lora_sum(lora_down_bwd_weight(x, ds), x.new_empty((ds.shape[1], x.shape[1]), dtype=dtype))
    return _mm_wide(ds.t(), x, dtype)


def _triton_serves(y: Tensor, *others: Tensor) -> bool:
    """Whether our kernels take y (tokens, features) and matrices (any, rank), and are to be taken."""
    if not y.is_cuda or y.dtype not in (torch.bfloat16, torch.float16) or y.numel() == 0:
        return False
    rank = others[0].shape[1]
    if rank == 0 or y.stride(1) != 1 or any(t.dtype != y.dtype for t in others):
        return False
    if (device_capability(y.device) or 0) < 80:
        return False
    return choice(RANK, y.device, lambda: rank_key(y, rank), rank_backends, "library") == "triton"


def _empty(dy: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty((dy.shape[1], s.shape[1]), dtype=dtype)


def _mm_wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, kept in fp32 where the product of 16-bit operands can be had so and the result is wanted in fp32."""
    if a.is_cuda and a.dtype != torch.float32 and dtype == torch.float32 and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)
