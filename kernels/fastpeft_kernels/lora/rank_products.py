"""Products with one side of rank width, bound by reading the other: by BLAS, in C++ on a CPU, or in Triton on a GPU.

On CPUs BLAS runs them far below its rate. Measured on an EPYC with AVX2, one thread, fp32, 1024 tokens, C++ / MKL,
least of 40 interleaved: dY B and dY^T S at rank 8 together 0.22 and 0.15 (768 and 2048 features), at rank 16 0.75 and
0.43, at 32 0.88 and 0.66, at 64 1.01 and 0.73; X A^T at rank 16 0.82 and 0.65. For dA = dS^T X MKL was as fast up to
768 features, so it stays there.

Our Triton kernels make a dropout mask anew where values are read or written; for the others what is left of the values
is a copy of its own. `backend` is a group's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.device import hopper_dots_safe
from ..common.random import dropout
from ..native import skinny, skinny_serves
from ..tuning.choosing import choice
from . import keys
from .projection import Mask


def project_down(
    y: Tensor, factor: Tensor, out: Tensor | None = None, mask: Mask | None = None, backend: str = "auto"
) -> Tensor:
    """dropout(y) factor, of y (tokens, features) and factor (features, rank)."""
    if _triton_reads(y, factor, mask, backend):
        from .forward import lora_down

        return lora_down(y, factor.t(), out=out, **_options(mask))
    if mask is not None:
        return project_down(dropout(y, *mask), factor, out, None, backend)
    if not skinny_serves(y, factor):
        return torch.mm(y, factor, out=out)
    if out is None:
        out = y.new_empty((y.shape[0], factor.shape[1]))
    skinny(y, b=factor, ds=out)
    return out


def up_gradient(
    dy: Tensor, s: Tensor, dtype: torch.dtype, factor: float | Tensor = 1.0, backend: str = "auto"
) -> Tensor:
    """factor dy^T s, (features, rank), of the parameter's `dtype`; dy (tokens, features), s (tokens, rank)."""
    if _triton_reads(dy, s, None, backend):
        from .backward import lora_down_bwd_weight
        from .partial_sums import lora_sum

        return lora_sum(lora_down_bwd_weight(dy, s, features_first=True), _empty(dy, s, dtype), factor)
    if not skinny_serves(dy, s):
        return _scaled(_mm_wide(dy.t(), s, dtype), factor, dtype)
    out = dy.new_empty((dy.shape[1], s.shape[1]))
    skinny(dy, s=s, db=out)
    return _scaled(out, factor, dtype)


def both_gradients(
    dy: Tensor,
    b: Tensor,
    s: Tensor,
    ds: Tensor,
    dtype: torch.dtype,
    factor: float | Tensor = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Fills ds with dy b and returns factor dy^T s, from one read of dy where it can be had."""
    ours = _triton_reads(dy, b, None, backend)
    if ours and dy.dtype.itemsize == 2:
        from .backward import lora_up_bwd
        from .configs import UP
        from .partial_sums import lora_sum

        if b.shape[1] <= UP[0].block_r:
            return lora_sum(lora_up_bwd(dy, b, s, ds), _empty(dy, s, dtype), factor)
    if backend == "triton" or not skinny_serves(dy, b, s, ds):
        backend = "triton" if ours else "library"  # s is as b, for which it was found out
        project_down(dy, b, ds, None, backend)
        return up_gradient(dy, s, dtype, factor, backend)
    out = dy.new_empty((dy.shape[1], s.shape[1]))
    skinny(dy, b=b, ds=ds, s=s, db=out)
    return _scaled(out, factor, dtype)


def down_gradient(ds: Tensor, x: Tensor, dtype: torch.dtype, mask: Mask | None = None, backend: str = "auto") -> Tensor:
    """ds^T dropout(x), (rank, features); ds (tokens, rank), x (tokens, features), `dtype` that of the parameter."""
    if _triton_reads(x, ds, mask, backend):
        from .backward import lora_down_bwd_weight
        from .partial_sums import lora_sum

        partial = lora_down_bwd_weight(x, ds, **_options(mask))
        return lora_sum(partial, x.new_empty((ds.shape[1], x.shape[1]), dtype=dtype))
    if mask is not None:
        return down_gradient(ds, dropout(x, *mask), dtype, None, backend)
    return _mm_wide(ds.t(), x, dtype)


def input_gradient(ds: Tensor, a: Tensor, dx: Tensor | None, mask: Mask | None = None, backend: str = "auto") -> Tensor:
    """dropout(ds a), or added to dx, which may be written over, in the wider of the two dtypes.

    Args:
        ds: (tokens, rank).
        a: (rank, features), dtype of ds.
        dx: (tokens, features), columns contiguous, or None.
    """
    if dx is not None:
        dx = dx.to(torch.promote_types(dx.dtype, ds.dtype))
        if triton_takes(dx.shape, ds, mask, backend):
            from .backward import lora_down_bwd_input_

            return lora_down_bwd_input_(dx, ds, a, **_options(mask))
    if mask is None and dx is not None and dx.dtype == ds.dtype:
        return torch.addmm(dx, ds, a, out=dx)
    part = torch.mm(ds, a)
    part = part if mask is None else dropout(part, *mask)
    return part if dx is None else dx.add_(part)


def triton_takes(shape: Sequence[int], narrow: Tensor, mask: Mask | None, backend: str) -> bool:
    """Whether our kernels are to compute products of a matrix (tokens, features), of shape `shape`, with narrow ones.

    Args:
        shape: (tokens, features).
        narrow: (any, rank); of its device, and dtype of the product.
        mask: dropout of the matrix, or None.
        backend: a group's; with "triton" they are, wherever there is anything to compute.
    """
    dtype = narrow.dtype
    if backend == "library" or (backend == "auto" and dtype.itemsize != 2):
        return False
    (tokens, features), rank, device = shape, narrow.shape[1], narrow.device
    if 0 in (tokens, features, rank):
        return False
    if backend == "triton":
        return True
    if chosen(tokens, features, rank, dtype, device, mask is not None) != "triton":
        return False
    return mask is None or hopper_dots_safe(device) is None


def chosen(tokens: int, features: int, rank: int, dtype: torch.dtype, device: torch.device, drops: bool) -> str:
    """ "library" or "triton", for products of a matrix (tokens, features), whose elements are dropped or not."""
    if dtype.itemsize != 2 or not keys.kernels_serve(device):
        return "library"

    def case() -> keys.RankKey:
        return keys.rank_key(tokens, features, rank, dtype)

    default = keys.default_rank_backend(device, tokens, features, rank, drops)
    return choice(keys.RANK, device, case, keys.rank_backends, default)


def _triton_reads(y: Tensor, narrow: Tensor, mask: Mask | None, backend: str) -> bool:
    """The same for a matrix y that is read: one that a measurement stands for, unless ours were asked for."""
    if backend == "auto" and (narrow.dtype.itemsize != 2 or y.dtype != narrow.dtype or y.stride(1) != 1):
        return False
    return triton_takes(y.shape, narrow, mask, backend)


def _options(mask: Mask | None) -> dict[str, Any]:
    return {} if mask is None else mask._asdict()


def _scaled(product: Tensor, factor: float | Tensor, dtype: torch.dtype) -> Tensor:
    """factor product, which is written over."""
    return (product if isinstance(factor, (int, float)) and factor == 1.0 else product.mul_(factor)).to(dtype)


def _empty(dy: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.new_empty((dy.shape[1], s.shape[1]), dtype=dtype)


def _mm_wide(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, kept in fp32 where the product of 16-bit operands can be had so and the result is wanted in fp32."""
    if a.is_cuda and a.dtype != torch.float32 and dtype == torch.float32 and a.dtype.itemsize == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b)
