"""What every kernel does to a tile of q kT, in either orientation, and how it loads rows."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.triton_random import kept
from .triton_mask import seen

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(ptr, row, stride, rows, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """(len(row), BLOCK) of a matrix of rows; zeros past the last row and feature."""
    feature = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None]
    if FEATURES < BLOCK:
        inside = inside & (feature < FEATURES)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + feature[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(ptr, value, row, stride, rows, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse, rounded to what the pointer points at."""
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
    scale, softcap, relative_ptr, bias_ptr, bias_row, bias_column,
    padding_ptr, dense_ptr, dense_row, dense_column,
    PLAIN: tl.constexpr, BOUNDED: tl.constexpr, LOWER: tl.constexpr,
):  # fmt: skip
    """Scores times log2(e), -inf where a key is not seen, and the slope of the soft cap (else the scores again).

    PLAIN: the product itself, whose factor `scale`, which is positive, is left to the caller, as a fused multiply-add.
    softcap comes times log2(e), and scale divided by it; else scale times log2(e). relative_ptr points at the distance 0
    of the head, the other pointers at the batch entry and head. row and column broadcast to the tile.
    """
    score = product
    slope = product
    if softcap is not None:
        capped = tanh(product * scale)
        slope = 1.0 - capped * capped
        score = capped * softcap
    elif not PLAIN:
        score = product * scale
    if (relative_ptr is not None) or (bias_ptr is not None):
        inside = (row < queries) & (column < keys)
        if relative_ptr is not None:
            score += tl.load(relative_ptr + (column - row), mask=inside, other=0.0).to(tl.float32) * LOG2E
        if bias_ptr is not None:
            place = bias_ptr + row.to(tl.int64) * bias_row + column.to(tl.int64) * bias_column
            score += tl.load(place, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if BOUNDED or (padding_ptr is not None) or (dense_ptr is not None):
        inside = seen(
            row, column, lower, upper, queries, keys,
            padding_ptr, dense_ptr, dense_row, dense_column, BOUNDED, LOWER,
        )  # fmt: skip
        score = tl.where(inside, score, float("-inf"))
    return score, slope


@triton.jit
def tile_gradients(
    score, dweights, lse, delta, first_key, second_key, column, seed_ptr, threshold, keep_scale
):  # fmt: skip
    """The weights that were kept, and the gradient of the scores as they went into the softmax.

    score and lse times log2(e). lse and delta, the product of a row of the output with its gradient, broadcast to the
    tile, and so do the keys of dropout and the columns.
    """
    weights = tl.exp2(score - lse)
    kept_weights = weights
    if seed_ptr is not None:
        keep = kept(first_key, second_key, column, threshold)
        kept_weights = tl.where(keep, weights, 0.0)
        dweights = tl.where(keep, dweights * keep_scale, 0.0)
    return kept_weights, weights * (dweights - delta)
