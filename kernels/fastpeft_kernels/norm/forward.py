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
from .gates import gate_factor
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
    gate_ptr,
    gate_stride,
    OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    MIDDLE: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    GATE_LAST: tl.constexpr,
    SIGMOID: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A tile of whole rows, or of one of GROUPS parts of them.

    x_ptr, gate_ptr: (rows, GROUPS * columns), columns contiguous. weight_ptr, bias_ptr: (GROUPS * columns,). y_ptr: as
    x, dense. mean_ptr, rstd_ptr: (rows, GROUPS), fp32. All but x_ptr, y_ptr and rstd_ptr may be None; mean_ptr unless
    CENTRED. GATE_FIRST, GATE_LAST: x, or the result, has the gate's factor, SiLU or with SIGMOID the sigmoid; else
    there is no gate.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    used = column < columns
    statistic = row
    if GROUPS > 1:
        column += tl.program_id(1) * columns
        statistic = row * GROUPS + tl.program_id(1)
    inside = (row < rows)[:, None] & used[None, :]
    place = row[:, None] * (columns * GROUPS) + column[None, :]

    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if GATE_FIRST or GATE_LAST:
        gate = tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = gate_factor(gate, SIGMOID)
    if GATE_FIRST:
        x *= factor
    if CENTRED:
        mean = tl.sum(x, axis=1) / columns
        tl.store(mean_ptr + statistic, mean, mask=row < rows)
        x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / columns + eps)
    tl.store(rstd_ptr + statistic, rstd, mask=row < rows)

    y = (x * rstd[:, None]).to(MIDDLE).to(tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=used, other=0.0).to(tl.float32)
        y *= (weight + OFFSET)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=used, other=0.0).to(tl.float32)[None, :]
    if GATE_LAST:
        y *= factor
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


_launch = Launcher(norm_fwd_kernel)


def norm_triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    form: Form,
    shape: Sequence[int] | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Kept]:
    """(y, what backward needs); x, gate: (rows, features), columns contiguous, not empty; y of x's shape, or `shape`.

    Raises:
        ValueError: as `tiles.check_launch`.
    """
    check_launch(norm_fwd_kernel, x, form)
    rows, columns = x.shape[0], x.shape[1] // form.groups
    block_rows, block_columns, num_warps = tile(columns, form.norm_before_gate)
    y = torch.empty(shape or x.shape, dtype=form.out, device=x.device)
    rstd = torch.empty((rows * form.groups,), dtype=torch.float32, device=x.device)
    mean = torch.empty_like(rstd) if form.centred else None
    _launch(
        x.device,
        (cdiv(rows, block_rows), form.groups),
        x, weight, bias, y, mean, rstd, rows, columns, x.stride(0), float(form.eps),
        gate, 0 if gate is None else gate.stride(0),
        OFFSET=form.offset,
        CENTRED=form.centred,
        MIDDLE=triton_type(form.middle),
        GATE_FIRST=form.norm_before_gate is False,
        GATE_LAST=form.norm_before_gate is True,
        SIGMOID=form.activation == "sigmoid",
        GROUPS=form.groups,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=num_warps,
    )  # fmt: skip
    return y, Kept(rstd, mean)
