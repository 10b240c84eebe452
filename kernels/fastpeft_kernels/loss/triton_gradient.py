"""Triton kernels of the losses' backward: the gradient of logits of known statistics, and the rescaling of sums.

On paper: an element of 16 bits is read and written, 4 bytes; a chunk of 2048 x 4096 in the second-level cache takes
6 us, 8192 whole rows of 128256 words 4.2 GB and 1.26 ms at an H100's 3.35 TB/s. Not measured yet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import block_of_words, column_of, exponential, logits_and_slopes


@triton.jit
def gradient_step_kernel(
    raw_ptr, out_ptr, bias_ptr, weight_ptr, labels_ptr,
    top_ptr, inverse_ptr, others_ptr, d_nll_ptr, d_lse_ptr, d_total_ptr,
    words, first, raw_stride, out_stride, factor, softcap,
    CAPPED: tl.constexpr, EXACT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of a token's row of `steps.gradient_step`'s result.

    raw_ptr, out_ptr: (tokens, words), columns contiguous; may be the same. bias_ptr, weight_ptr: (words,) of this
    chunk, or None. labels_ptr: (tokens,) int64. The others: (tokens,) fp32; the last three may be None, which is zero.
    Where all three are zero so is the row, whatever the logits are, which are not read.
    """
    blocks = tl.cdiv(words, LANES * WIDTH)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * (LANES * WIDTH) + block_of_words(LANES, WIDTH)
    inside = column < words
    d_nll = 0.0
    if d_nll_ptr is not None:
        d_nll = tl.load(d_nll_ptr + token)
    d_lse = 0.0
    if d_lse_ptr is not None:
        d_lse = tl.load(d_lse_ptr + token)
    d_total = 0.0
    if d_total_ptr is not None:
        d_total = tl.load(d_total_ptr + token)
    gradient = tl.zeros((LANES, WIDTH), tl.float32)
    if (d_nll != 0.0) | (d_lse != 0.0) | (d_total != 0.0):
        raw_ptr += token * raw_stride
        z, slope = logits_and_slopes(raw_ptr, bias_ptr, column, inside, factor, softcap, CAPPED, EXACT)
        p = exponential(z - tl.load(top_ptr + token), EXACT) * tl.load(inverse_ptr + token)
        y = column_of(tl.load(labels_ptr + token), first, words)
        at_label = d_lse * p - d_nll * tl.load(others_ptr + token)
        gradient = tl.where(column == y, at_label, (d_nll + d_lse) * p)
        if d_total_ptr is not None:
            weight = 1.0
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
            gradient += d_total * weight
        gradient *= slope
    tl.store(out_ptr + token * out_stride + column, gradient.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rescale_kernel(acc_ptr, factor_ptr, columns, acc_stride, BLOCK: tl.constexpr):
    """A row of acc_ptr (rows, columns) fp32 times factor_ptr (rows,); nothing is read or written where that is 1."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row)
    if factor != 1.0:
        acc_ptr += row * acc_stride
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < columns
            acc = tl.load(acc_ptr + column, mask=inside, other=0.0)
            tl.store(acc_ptr + column, acc * factor, mask=inside)
