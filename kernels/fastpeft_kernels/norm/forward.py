"""Triton kernel for RMSNorm and LayerNorm.

On paper. An element costs a read and a write, 4 bytes in bf16. 8192 x 4096 moves 134 MB, for which an H200's 4.8 TB/s
need 28 us. LlamaRMSNorm's six operations move 2 + 4, 4 + 4, 4, 4 + 4, 4 + 2 and 2 + 2 bytes an element, 36 in all. A
program holds its rows in registers, so x is read once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv
from ..common.launching import Launcher
from .form import Form
from .library import Kept
from .tiles import check_launch, tile, triton_type


@triton.jit
def norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    columns,
    x_stride,
    eps,
    OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    MIDDLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A tile of whole rows.

    x_ptr: (rows, columns), columns contiguous. weight_ptr, bias_ptr: (columns,). y_ptr: as x, dense. mean_ptr,
    rstd_ptr: (rows,), fp32. weight_ptr, bias_ptr and mean_ptr may be None; the latter unless CENTRED.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    used = column < columns
    inside = (row < rows)[:, None] & used[None, :]
    place = row[:, None] * columns + column[None, :]

    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, axis=1) / columns
        tl.store(mean_ptr + row, mean, mask=row < rows)
        x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / columns + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)

    y = (x * rstd[:, None]).to(MIDDLE).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=used, other=0.0).to(tl.float32)
        y *= (weight + OFFSET)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=used, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


_launch = Launcher(norm_fwd_kernel)


def norm_triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, form: Form, shape: Sequence[int] | None = None
) -> tuple[Tensor, Kept]:
    """(y, what backward needs); x: (rows, features), columns contiguous, not empty; y of x's shape, or of `shape`.

    Raises:
        ValueError: as `tiles.check_launch`.
    """
    check_launch(norm_fwd_kernel, x)
    rows, columns = x.shape
    block_rows, block_columns, num_warps = tile(columns)
    y = torch.empty(shape or (rows, columns), dtype=form.out, device=x.device)
    rstd = torch.empty((rows,), dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if form.centred else None
    _launch(
        x.device,
        (cdiv(rows, block_rows),),
        x, weight, bias, y, mean, rstd, rows, columns, x.stride(0), float(form.eps),
        OFFSET=form.offset,
        CENTRED=form.centred,
        MIDDLE=triton_type(form.middle),
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=num_warps,
    )  # fmt: skip
    return y, Kept(rstd, mean)
