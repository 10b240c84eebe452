"""Counter-based dropout: whether an element is kept depends on (seed, stream, row, column) alone.

No mask is stored: backward, a recomputed forward and every kernel ask for the same bits again. The bits are the same on
every device and in Triton (`triton_random.py`). The seed is an int64 tensor that stays on its device, so that drawing
one neither waits for a GPU nor breaks a CUDA graph.

The generator hashes the counter with `lowbias32` (C. Wellons, "Prospecting for Hash Functions", 2018), keyed twice per
row: about a tenth of Philox's instructions, which matters on CPU, where no fused kernel hides them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..native import dropout_native
from .device import triton_serves
from .shapes import imitated

C1, C2 = 0x7FEB352D, 0x846CA68B
ROW_STEP, STREAM_STEP, COLUMN_STEP = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_LOW = 0xFFFFFFFF
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_CHUNK = 1 << 16  # elements hashed at a time on CPU: intermediate values stay in the second-level cache


def draw_seed(device: torch.device) -> Tensor:
    """One seed, int64 of shape (1,), from torch's generator of `device`; no synchronisation."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def seeds_from(seed: Tensor, first_rows: Tensor) -> Tensor:
    """Seeds under which row i of a matrix gets the bits that row `first_rows + i` gets under `seed`.

    Two halves of a seed enter a row's keys, the low one beside the row's number: what is added to it is taken out of
    the high one again. Rows are below 2**32.

    Args:
        seed: as for `dropout_bits`.
        first_rows: int64 (n,) on its device.

    Returns:
        int64 (n, 1), rows 16 bytes apart, as memory that torch allocates is aligned at the least.
    """
    low, high = seed & _LOW, (seed >> 32) & _LOW
    moved = (first_rows * ROW_STEP + low) & _LOW
    other = high ^ _mix(low) ^ _mix(moved)
    return ((other << 32) | moved)[:, None].repeat(1, 2)[:, :1]


def keep_threshold(p: float) -> int:
    """The element is kept when its bits, read as int32, are at least this: P(keep) = 1 - p to within 2**-32."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p: expected a dropout probability in [0, 1), got {p}")
    return min(round(p * 2**32), _LOW) - 2**31


def dropout_bits(
    seed: Tensor, first_row: int, rows: int, columns: int, stream: int | Tensor = 0, first_column: int = 0
) -> Tensor:
    """The random bits of a block.

    Args:
        seed: int64 tensor of shape (1,), as `draw_seed` gives it.
        first_row, first_column: index of the block's first row and column in the whole matrix.
        rows, columns: size of the block.
        stream: distinguishes masks that share a seed (an adapter's index); many as an int64 tensor of any shape.

    Returns:
        int32 tensor (rows, columns), or (*stream.shape, rows, columns), uniform over all int32 values.
    """
    device = seed.device
    if isinstance(stream, Tensor):
        stream = stream.unsqueeze(-1)
    row = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device)
    low, high = seed & _LOW, (seed >> 32) & _LOW
    first = _mix(row * ROW_STEP + low + stream * STREAM_STEP)
    second = _mix(first ^ high ^ _mix((row >> 32) + low))
    column = torch.arange(first_column, first_column + columns, dtype=torch.int32, device=device)
    bits = column.mul_(COLUMN_STEP - 2**32) + _as_int32(first).unsqueeze(-1)
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(C1)
    bits.bitwise_xor_(_as_int32(second).unsqueeze(-1))
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(C2 - 2**32)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def dropout(x: Tensor, seed: Tensor, p: float, stream: int = 0, out: Tensor | None = None) -> Tensor:
    """Inverted dropout of a matrix: kept elements times 1 / (1 - p), the others 0.

    Args:
        x: (rows, columns), floating.
        seed, stream: as for `dropout_bits`.
        p: probability of dropping, in [0, 1).
        out: like x; filled and returned. It may be x itself, or share no memory with it.

    Returns:
        `out`, or a new tensor like x. Calling it on the gradient gives the gradient.
    """
    out = torch.empty_like(x) if out is None else out
    if p == 0.0:
        return out.copy_(x)
    if imitated(x.device):
        return out
    eager = not torch.compiler.is_compiling()
    if eager and x.dtype in TRITON_DTYPES and triton_serves(x.device):
        from .triton_random import dropout_triton

        return dropout_triton(x, seed, p, stream, out)
    rows, columns = x.shape
    threshold, scale = keep_threshold(p), 1.0 / (1.0 - p)
    if eager and x.device.type == "cpu" and dropout_native(x, out, int(seed), stream, threshold, scale):
        return out
    step = max(1, _CHUNK // max(columns, 1)) if x.device.type == "cpu" else max(rows, 1)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        keep = dropout_bits(seed, first, count, columns, stream) >= threshold
        part = out[first : first + count]
        torch.mul(x[first : first + count], scale, out=part)
        part.masked_fill_(keep.logical_not_(), 0.0)  # not a product with the mask: inf and NaN must not survive a drop
    return out


class CounterDropout(torch.autograd.Function):
    """Counter-based dropout of a matrix; its gradient is the same dropout of the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, seed: Tensor, p: float, stream: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.mask = (seed, p, stream)
        return dropout(x, seed, p, stream)

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[no-untyped-def]
        return CounterDropout.apply(dy, *ctx.mask), None, None, None


def dropped(x: Tensor, seed: Tensor, p: float, stream: int = 0) -> Tensor:
    """`dropout` of x (..., columns), differentiable."""
    return CounterDropout.apply(x.reshape(-1, x.shape[-1]), seed, p, stream).view(x.shape)  # type: ignore[no-any-return]


def _mix(x: Tensor) -> Tensor:
    """lowbias32 of int64 values taken modulo 2**32."""
    x = x & _LOW
    x = ((x ^ (x >> 16)) * C1) & _LOW
    x = ((x ^ (x >> 15)) * C2) & _LOW
    return x ^ (x >> 16)


def _as_int32(x: Tensor) -> Tensor:
    return (x - ((x >> 31) << 32)).to(torch.int32)
