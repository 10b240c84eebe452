"""What the Triton kernels of this family know of a row of logits. All arithmetic is fp32.

EXACT is for logits in fp32: exponentials and divisions to the last bit or two; 16 bits hide what is saved without it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activation.triton_math import exp_of_negative, reciprocal

_LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Reference point of exponentials where nothing but -inf was met: -inf - LOWEST is -inf, not NaN."""


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """exp(x) for x up to a few units above zero, and zero for -inf."""
    if not EXACT:
        return tl.exp2(x * _LOG2E)  # unlike tl.exp without instructions for results below 2^-126, which are zero here
    return tl.where(x < -104.0, 0.0, exp_of_negative(x, EXACT))


@triton.jit
def column_of(label, first, words):
    """Of a label, int64, in a chunk of words, int32; -1 where it is of none."""
    y = label - first
    return tl.where((y >= 0) & (y < words), y, -1).to(tl.int32)


@triton.jit
def block_of_words(LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of a block, (LANES, WIDTH): those of a lane lie side by side, in one thread."""
    return tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def tanh_and_slope(x, EXACT: tl.constexpr):
    """tanh(x) and 1 - tanh(x)^2."""
    magnitude = tl.abs(x)
    t = exponential(-2.0 * magnitude, EXACT)
    r = reciprocal(1.0 + t, EXACT)
    tanh = (1.0 - t) * r
    if EXACT:  # the difference loses digits near zero; the polynomial is Cephes' (tanhf.c)
        square = x * x
        p = tl.fma(square, -5.70498872745e-3, 2.06390887954e-2)
        p = tl.fma(p, square, -5.37397155531e-2)
        p = tl.fma(p, square, 1.33314422036e-1)
        p = tl.fma(p, square, -3.33332819422e-1)
        near = tl.fma(p * square, magnitude, magnitude)
        tanh = tl.where(magnitude < 0.625, near, 1.0 - 2.0 * (t * r))
    return tl.where(x < 0, -tanh, tanh), 4.0 * t * r * r


@triton.jit
def logits_and_slopes(
    raw_ptr, bias_ptr, column, inside, factor, softcap, CAPPED: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """z = factor (raw + bias), or softcap tanh of that if CAPPED; and the tanh's slope, or 1. Outside anything.

    raw_ptr: the row; bias_ptr: (words,) or None.
    """
    x = tl.load(raw_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    x *= factor
    slope = tl.zeros_like(x) + 1.0
    if CAPPED:
        tanh, slope = tanh_and_slope(x, EXACT)
        x = softcap * tanh
    return x, slope


@triton.jit
def within(z, inside, partly):
    """z where it is inside and -inf elsewhere. partly: whether any is outside, so that most blocks skip this."""
    if partly:
        z = tl.where(inside, z, float("-inf"))
    return z


@triton.jit
def moved_reference(reference, z, EXACT: tl.constexpr):
    """Of lanes: reference points that no z exceeds, the old ones less these, and that difference's exponential."""
    moved = tl.maximum(reference, tl.max(z, axis=1))
    shift = tl.maximum(reference - moved, -1e4)
    return moved, shift, exponential(shift, EXACT)
