"""Triton kernel for gated activations: h = act(gate) * up in one pass.

On paper. An element costs two reads and a write: 6 bytes in bf16. 8192 x 14336 moves 705 MB, for which an H200's 4.8
TB/s need 147 us; PyTorch's two operations move 10 bytes an element. Beside the memory goes the issue of instructions:
132 SMs x 128 lanes x 1.75 GHz issue 37 of them in the time of 6 bytes. Compiled for sm_90, addresses and conversions
included, an element takes 26 in silu and quick_gelu, 30 in gelu_tanh, 45 in gelu, 16 in the relus. So gelu in bf16 is
predicted to be bound by arithmetic, a fifth above the floor, the others by memory; in fp32, 12 bytes, silu takes 38
and gelu 52 of the 74 there is time for. Measured on an H200: 165 us in silu and gelu_tanh, 194 in gelu.

A thread takes 8 consecutive elements, one 16-byte load a tensor in 16-bit types. A tile is within one row of a wide
matrix, so that rows may be any distance apart; of a narrow one it takes several.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launching import Launcher
from .tiles import CONFIGS, Config, launch
from .triton_math import activate


@triton.jit
def gated_activation_fwd_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    rows,
    columns,
    gate_stride,
    up_stride,
    h_stride,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A tile of h. gate_ptr, up_ptr, h_ptr: (rows, columns), floating, columns contiguous; h may be an input.

    GATED: whether there is a gate; gate_ptr is not read without. EXACT: round the division correctly.
    """
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (program % tiles) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)

    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
        value, _ = activate(gate, KIND, EXACT)
        h = value * up
    else:
        h, _ = activate(up, KIND, EXACT)
    tl.store(h_ptr + row * h_stride + column, h.to(h_ptr.dtype.element_ty), mask=inside)


_launch = Launcher(gated_activation_fwd_kernel)


def gated_activation_triton(gate: Tensor | None, up: Tensor, kind: str, h: Tensor, config: Config = CONFIGS[0]) -> None:
    """Fill `h`; tensors as `api` has checked them, not empty.

    Raises:
        ValueError: as `tiles.launch`.
    """
    strides = (0 if gate is None else gate.stride(0), up.stride(0), h.stride(0))
    launch(
        _launch, up, config, gate, up, h, *up.shape, *strides,
        KIND=kind, GATED=gate is not None, EXACT=up.dtype == torch.float32,
    )  # fmt: skip
