"""Triton kernel for the gradients of gated activations: dgate, dup and, again, h in one pass.

On paper. An element costs three reads and two writes, three with h: 10 or 12 bytes in bf16. 8192 x 14336 with h moves
1.41 GB, for which an H200's 4.8 TB/s need 294 us. That much memory takes the time of 74 instructions an element (see
`forward`); compiled for sm_90 it takes 38 of them in silu, 45 in gelu_tanh and 55 in gelu, so all are predicted to be
bound by memory. PyTorch's five operations move 28 bytes an element.

Measured on an H200: 337 us in silu and gelu_tanh, 342 in gelu, 4.2 TB/s, what a copy reaches there; PyTorch's
operations 1881 us.

A program reads its tile whole before it writes, so that a result may lie where an input does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launching import Launcher
from .tiles import CONFIGS, Config, launch
from .triton_math import activate, gradient


@triton.jit
def gated_activation_bwd_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    h_ptr,
    rows,
    columns,
    dh_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    h_stride,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    WITH_H: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A tile of dgate, dup and h. All pointers: (rows, columns), columns contiguous; a result may be an input.

    GATED: whether there are gate and dgate; WITH_H: whether h is wanted; what is not there is not touched. EXACT: round
    the division correctly.
    """
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (program % tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)

    dh = tl.load(dh_ptr + row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        value, slope = activate(gate, KIND, EXACT)
        dgate = gradient(dh * up, gate, slope, KIND)
        dup = dh * value
        h = value * up
        tl.store(dgate_ptr + row * dgate_stride + column, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    else:
        h, slope = activate(up, KIND, EXACT)
        dup = gradient(dh, up, slope, KIND)
    tl.store(dup_ptr + row * dup_stride + column, dup.to(dup_ptr.dtype.element_ty), mask=inside)
    if WITH_H:
        tl.store(h_ptr + row * h_stride + column, h.to(h_ptr.dtype.element_ty), mask=inside)


_launch = Launcher(gated_activation_bwd_kernel)


def gated_activation_backward_triton(
    dh: Tensor,
    gate: Tensor | None,
    up: Tensor,
    kind: str,
    dgate: Tensor | None,
    dup: Tensor,
    h: Tensor | None,
    config: Config = CONFIGS[0],
) -> None:
    """Fill `dgate`, `dup` and `h`; tensors as `api` has checked them, not empty.

    Raises:
        ValueError: as `tiles.launch`.
    """
    matrices = (dh, gate, up, dgate, dup, h)
    strides = [0 if matrix is None else matrix.stride(0) for matrix in matrices]
    launch(
        _launch, up, config, *matrices, *up.shape, *strides,
        KIND=kind, GATED=gate is not None, WITH_H=h is not None, EXACT=up.dtype == torch.float32,
    )  # fmt: skip
