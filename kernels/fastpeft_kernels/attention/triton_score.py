"""What every kernel does to a tile of q kT, in either orientation, and how it loads rows."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.triton_random import kept
from . import relative
from .triton_mask import seen

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
COPY_BITS = tl.constexpr(relative.COPY_BITS)
COPY_UNIT = tl.constexpr(relative.UNIT)
MARGIN = tl.constexpr(relative.MARGIN)


@triton.jit
def load_tile(
    source, batch, head, first, batch_stride, head_stride, row_stride, rows,
    TMA: tl.constexpr, UNIT: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(ROWS, BLOCK) of (batch, heads, rows, features) from row `first` on; zeros past the last row and feature.

    TMA: source is a descriptor of blocks (1, 1, ROWS, BLOCK), else a pointer, with strides in units of UNIT.
    """
    if TMA:
        tile = source.load([batch.to(tl.int32), head.to(tl.int32), first, 0]).reshape(ROWS, BLOCK)
    else:
        row = first + tl.arange(0, ROWS)
        feature = tl.arange(0, BLOCK)
        inside = (row < rows)[:, None]
        if FEATURES < BLOCK:
            inside = inside & (feature < FEATURES)[None, :]
        base = source + (batch * batch_stride + head * head_stride) * UNIT
        tile = tl.load(
            base + row.to(tl.int64)[:, None] * (row_stride * UNIT) + feature[None, :], mask=inside, other=0.0
        )
    return tile


@triton.jit
def store_rows(ptr, value, row, stride, rows, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of BLOCK features, rounded to what the pointer points at; nothing past the last row and feature."""
    feature = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None]
    if FEATURES < BLOCK:
        inside = inside & (feature < FEATURES)[None, :]
    place = ptr + row.to(tl.int64)[:, None] * stride + feature[None, :]
    tl.store(place, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def tanh(x):
    """To two or three units in the last place: Cephes' polynomial near 0, elsewhere by the exponential."""
    square = x * x
    p = tl.fma(square, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.fma(p, square, -5.37397155531e-2)
    p = tl.fma(p, square, 1.33314422036e-1)
    p = tl.fma(p, square, -3.33332819422e-1)
    small = tl.fma(p * square, x, x)
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)  # the exponential may be infinite
    return tl.where(square < 0.390625, small, tl.where(x < 0.0, -large, large))


@triton.jit
def tile_scores(
    product, row, column, lower, upper, queries, keys,
    scale, softcap, relative_ptr, relative_copy, bias_ptr, bias_row, padding_ptr, dense_ptr, dense_row,
    BIAS_COLUMN: tl.constexpr, BIAS_UNIT: tl.constexpr, DENSE_COLUMN: tl.constexpr, DENSE_UNIT: tl.constexpr,
    PLAIN: tl.constexpr, NATURAL: tl.constexpr, BOUNDED: tl.constexpr, LOWER: tl.constexpr,
    ALONG_QUERIES: tl.constexpr = False,
):  # fmt: skip
    """Scores, -inf where a key is not seen, and the slope of the soft cap (else the scores again).

    Scores are times log2(e), unless NATURAL, as for fp32, where that would add roundings to what has few.
    PLAIN: the product itself, whose factor `scale`, which is positive, is left to the caller, as a fused multiply-add.
    With a softcap scale comes divided by it, and softcap times log2(e); else scale does. relative_ptr points at the
    head's copies, as `relative.in_copies` makes them, the other pointers at the batch entry and head. row and column
    broadcast to the tile; both begin at a multiple of 16. ALONG_QUERIES: for tiles of keys x queries; the copies are of
    the bias in reversed order.
    """
    score = product
    slope = product
    if softcap is not None:
        capped = tanh(product * scale)
        slope = 1.0 - capped * capped
        score = capped * softcap
    elif not PLAIN:
        score = product * scale
    per_nat = 1.0 if NATURAL else LOG2E
    if relative_ptr is not None:
        COPIES: tl.constexpr = COPY_BITS // relative_ptr.dtype.element_ty.primitive_bitwidth
        place = (keys - column if ALONG_QUERIES else queries - row) + (MARGIN - 1)
        aligned = place // COPIES * COPIES
        in_copy = (place - aligned) * (relative_copy * COPY_UNIT) + aligned
        score += tl.load(relative_ptr + in_copy + (row if ALONG_QUERIES else column)).to(tl.float32) * per_nat
    if bias_ptr is not None:
        inside = (row < queries) & (column // BIAS_UNIT * BIAS_UNIT < keys)
        place = bias_ptr + row.to(tl.int64) * (bias_row * BIAS_UNIT) + column.to(tl.int64) * BIAS_COLUMN
        score += tl.load(place, mask=inside, other=0.0).to(tl.float32) * per_nat
    if BOUNDED or (padding_ptr is not None) or (dense_ptr is not None):
        inside = seen(
            row, column, lower, upper, queries, keys,
            padding_ptr, dense_ptr, dense_row, DENSE_COLUMN, DENSE_UNIT, BOUNDED, LOWER,
        )  # fmt: skip
        score = tl.where(inside, score, float("-inf"))
    return score, slope


@triton.jit
def power(x, NATURAL: tl.constexpr):
    """e or 2 to the power of x."""
    return tl.exp(x) if NATURAL else tl.exp2(x)


@triton.jit
def tile_gradients(
    score, dweights, lse, delta, first_key, second_key, column, seed_ptr, threshold, keep_scale, NATURAL: tl.constexpr
):
    """The weights that were kept, and the gradient of the scores as they went into the softmax.

    lse, in the units of the score, and delta, the product of a row of the output with its gradient, broadcast to the
    tile, and so do the keys of dropout and the columns.
    """
    weights = power(score - lse, NATURAL)
    kept_weights = weights
    if seed_ptr is not None:
        keep = kept(first_key, second_key, column, threshold)
        kept_weights = tl.where(keep, weights, 0.0)
        dweights = tl.where(keep, dweights * keep_scale, 0.0)
    return kept_weights, weights * (dweights - delta)
