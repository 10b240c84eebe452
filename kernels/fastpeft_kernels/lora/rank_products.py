"""Products with one side of rank width: some in C++ on a CPU, where BLAS runs them far below its rate, else by BLAS.

Measured on an EPYC with AVX2, one thread, fp32, 1024 tokens, C++ / MKL, least of 40 interleaved: dY B and dY^T S at
rank 8 together 0.22 and 0.15 (768 and 2048 features), at rank 16 0.75 and 0.43, at 32 0.88 and 0.66, at 64 1.01 and
0.73; X A^T at rank 16 0.82 and 0.65. For dA = dS^T X MKL was as fast up to 768 features, so it stays there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import skinny, skinny_serves


def project_down(y: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """y factor, of y (tokens, features) and factor (features, rank)."""
    if not skinny_serves(y, factor):
        return torch.mm(y, factor, out=out)
    if out is None:
        out = y.new_empty((y.shape[0], factor.shape[1]))
    skinny(y, b=factor, ds=out)
    return out


def up_gradient(dy: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """dy^T s, (features, rank); dy (tokens, features), s (tokens, rank), `dtype` that of the parameter."""
    if not skinny_serves(dy, s):
        return mm_wide(dy.t(), s, dtype)
    out = dy.new_empty((dy.shape[1], s.shape[1]))
    skinny(dy, s=s, db=out)
    return out


def both_gradients(dy: Tensor, b: Tensor, s: Tensor, ds: Tensor, dtype: torch.dtype) -> Tensor:
    """Fills ds with dy b and returns dy^T s, from one read of dy where it can be had."""
    if not skinny_serves(dy, b, s, ds):
        torch.mm(dy, b, out=ds)
        return up_gradient(dy, s, dtype)
    out = dy.new_empty((dy.shape[1], s.shape[1]))
    skinny(dy, b=b, ds=ds, s=s, db=out)
    return out


def mm_wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, kept in fp32 where the product of 16-bit operands can be had so and the result is wanted in fp32."""
    if a.is_cuda and a.dtype != torch.float32 and dtype == torch.float32 and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)
