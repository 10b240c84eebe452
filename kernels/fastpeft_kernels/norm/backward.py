"""Triton kernel for the gradients of RMSNorm and LayerNorm: x's in one pass, with the weight's where it is wanted.

On paper. An element costs two reads and a write, 6 bytes in bf16. 8192 x 4096 moves 201 MB, for which an H200's 4.8
TB/s need 42 us. A frozen weight costs nothing more: it is read by every program, from the second-level cache. For a
trained one, and the bias, each of a fixed number of programs sums up its rows in fp32, and PyTorch sums up the
programs: 512 x 4096 x 4 bytes, written and read, 4 us; in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv
from ..common.launching import Launcher
from .form import Form
from .gates import gate_factor, gate_slope
from .library import Gradients, Kept
from .tiles import PARTIAL_SUMS, check_launch, tile


@triton.jit
def norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    columns,
    dy_stride,
    x_stride,
    steps,
    gate_ptr,
    dgate_ptr,
    gate_stride,
    OFFSET: tl.constexpr,
    CENTRED: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    GATE_LAST: tl.constexpr,
    SIGMOID: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """`steps` tiles of whole rows, or of one of GROUPS parts of them, one after the other.

    dy_ptr, x_ptr, gate_ptr: (rows, GROUPS * columns), columns contiguous; dx_ptr, dgate_ptr: as these, dense.
    weight_ptr: (GROUPS * columns,). mean_ptr, rstd_ptr: (rows, GROUPS), fp32. dweight_ptr, dbias_ptr:
    (programs, GROUPS * columns), fp32. All but dy_ptr, x_ptr and rstd_ptr may be None; mean_ptr unless CENTRED.
    GATE_FIRST, GATE_LAST, SIGMOID: as in `norm_fwd_kernel`.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_COLUMNS)
    used = column < columns
    width = columns * GROUPS
    if GROUPS > 1:
        column += tl.program_id(1) * columns
    scale = tl.full((BLOCK_COLUMNS,), 1.0, tl.float32)
    if weight_ptr is not None:
        scale = tl.load(weight_ptr + column, mask=used, other=0.0).to(tl.float32) + OFFSET
    if dweight_ptr is not None:
        dweight = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    if dbias_ptr is not None:
        dbias = tl.zeros((BLOCK_COLUMNS,), tl.float32)

    for step in range(steps):
        row = (program.to(tl.int64) * steps + step) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & used[None, :]
        dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        statistic = row
        if GROUPS > 1:
            statistic = row * GROUPS + tl.program_id(1)
        rstd = tl.load(rstd_ptr + statistic, mask=row < rows, other=0.0)
        place = row[:, None] * width + column[None, :]
        if GATE_FIRST or GATE_LAST:
            gate = tl.load(gate_ptr + row[:, None] * gate_stride + column[None, :], mask=inside, other=0.0)
            gate = gate.to(tl.float32)
            factor = gate_factor(gate, SIGMOID)
        if GATE_FIRST:
            ungated = x
            x *= factor
        if GATE_LAST:
            if dgate_ptr is not None:
                dgate = dy * (x * rstd[:, None]) * scale[None, :] * gate_slope(gate, SIGMOID)
                tl.store(dgate_ptr + place, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
            dy *= factor
        if CENTRED:
            x = tl.where(inside, x - tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None], 0.0)
        normalised = x * rstd[:, None]
        if dweight_ptr is not None:
            dweight += tl.sum(dy * normalised, axis=0)
        if dbias_ptr is not None:
            dbias += tl.sum(dy, axis=0)
        if (dx_ptr is not None) or (GATE_FIRST and dgate_ptr is not None):
            gradient = dy * scale[None, :]
            share = tl.sum(gradient * normalised, axis=1) / columns
            dx = gradient - normalised * share[:, None]
            if CENTRED:
                dx -= (tl.sum(gradient, axis=1) / columns)[:, None]
            dx *= rstd[:, None]
            if GATE_FIRST:
                if dgate_ptr is not None:
                    dgate = dx * ungated * gate_slope(gate, SIGMOID)
                    tl.store(dgate_ptr + place, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
                dx *= factor
            if dx_ptr is not None:
                tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)

    sums = program.to(tl.int64) * width + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + sums, dweight, mask=used)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + sums, dbias, mask=used)


_launch = Launcher(norm_bwd_kernel)


def norm_backward_triton(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    kept: Kept,
    form: Form,
    needs: tuple[bool, ...],
    gate: Tensor | None = None,
) -> Gradients:
    """As `library.norm_backward_library`; all matrices with contiguous columns, not empty.

    Raises:
        ValueError: as `tiles.check_launch`.
    """
    check_launch(norm_bwd_kernel, x, form)
    rows, columns = x.shape[0], x.shape[1] // form.groups
    block_rows, block_columns, num_warps = tile(columns, form.norm_before_gate)
    tiles = cdiv(rows, block_rows)
    steps = cdiv(tiles, PARTIAL_SUMS) if any(needs[1:3]) else 1
    programs = cdiv(tiles, steps)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    dgate = None if gate is None or not needs[3] else torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    dweight, dbias = [
        torch.empty((programs, x.shape[1]), dtype=torch.float32, device=x.device) if need else None
        for need in needs[1:3]
    ]
    _launch(
        x.device,
        (programs, form.groups),
        dy, x, weight, kept.mean, kept.rstd, dx, dweight, dbias, rows, columns, dy.stride(0), x.stride(0), steps,
        gate, dgate, 0 if gate is None else gate.stride(0),
        OFFSET=form.offset,
        CENTRED=form.centred,
        GATE_FIRST=form.norm_before_gate is False,
        GATE_LAST=form.norm_before_gate is True,
        SIGMOID=form.activation == "sigmoid",
        GROUPS=form.groups,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=num_warps,
    )  # fmt: skip
    dweight, dbias = [None if sums is None else sums.sum(0) for sums in (dweight, dbias)]
    return Gradients(dx, dweight, dbias, dgate)
