"""Triton kernel that brings a chunk of words into the running statistics of its tokens, and leaves exponentials.

On paper, for a chunk of 2048 tokens x 4096 words in bf16, 16.8 MB, fresh from its product and so in the second-level
cache: 33.6 MB are read and written, 6 us at 5.5 TB/s; compiled for sm_90 an element takes 17 instructions, 5 us
of an H100's 29.6e12 a second. The chunk's two products take about 100 us each. Not measured yet.

With WRITE the reference point must be known before the first exponential, so a program reads its row twice, the second
time from the first-level cache (8 KB). Without it each lane keeps a reference point of its own and one read does: that
is how the statistics of whole rows of logits are made, which no cache holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import LOWEST, block_of_words, column_of, exponential, logits_and_slopes, moved_reference, within


@triton.jit
def online_step_kernel(
    raw_ptr, bias_ptr, weight_ptr, labels_ptr,
    top_ptr, others_ptr, label_ptr, factor_ptr, tilted_ptr, high_ptr, best_ptr, total_ptr,
    words, first, raw_stride, factor, softcap, slack, ignore_index,
    WRITE: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A token. raw_ptr: (tokens, words), columns contiguous. bias_ptr, weight_ptr: (words,) of this chunk, or None.
    factor, softcap: as `triton_rows.logits_and_slopes`.

    labels_ptr: (tokens,) int64. The others are the fields of `steps.Running`, fp32 but for best_ptr, which is int64.
    A token whose label is ignore_index is left as it is, its row unread, unless ignore_index is None.
    """
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + token)
    if ignore_index is not None:  # noqa: SIM102 (told when it is compiled, and when it runs)
        if label == ignore_index:
            return
    y = column_of(label, first, words)
    raw_ptr += token * raw_stride
    columns = block_of_words(LANES, WIDTH)
    # All that is read of a token is read before anything is written.
    top = tl.load(top_ptr + token)
    others_before = tl.load(others_ptr + token)
    z_before = tl.load(label_ptr + token)
    here = y >= 0
    z_label, _at_label = logits_and_slopes(raw_ptr, bias_ptr, y, here, factor, softcap, CAPPED, True)

    new = top
    reference = tl.full((LANES,), LOWEST, tl.float32)
    if WRITE:
        for start in range(0, words, LANES * WIDTH):
            column = start + columns
            inside = column < words
            z, slope = logits_and_slopes(raw_ptr, bias_ptr, column, inside, factor, softcap, CAPPED, EXACT)
            z = within(z, inside, start + LANES * WIDTH > words)
            reference = tl.maximum(reference, tl.max(z, axis=1))
        peak = tl.max(reference, axis=0)
        new = tl.where(peak > top + slack, peak, top)
        reference = tl.zeros_like(reference) + new

    others = tl.zeros((LANES,), tl.float32)
    whole = tl.zeros((LANES,), tl.float32)
    tilted = tl.zeros((LANES,), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    high = tl.full((LANES,), float("-inf"), tl.float32)
    best = tl.zeros((LANES,), tl.int32)
    for start in range(0, words, LANES * WIDTH):
        column = start + columns
        inside = column < words
        z, slope = logits_and_slopes(raw_ptr, bias_ptr, column, inside, factor, softcap, CAPPED, EXACT)
        z = within(z, inside, start + LANES * WIDTH > words)
        if not WRITE:
            reference, shift, shrink = moved_reference(reference, z, EXACT)
            others *= shrink
            if tilted_ptr is not None:
                tilted = (tilted + shift * whole) * shrink
                whole *= shrink
        below = z - reference[:, None]
        e = exponential(below, EXACT)
        if tilted_ptr is not None:
            tilted += tl.sum(tl.where(e == 0.0, 0.0, e * below), axis=1)
            whole += tl.sum(e, axis=1)
        e = tl.where(column == y, 0.0, e)
        others += tl.sum(e, axis=1)
        if WRITE:
            tl.store(raw_ptr + column, (e * slope).to(raw_ptr.dtype.element_ty), mask=inside)
        if total_ptr is not None:
            share = z
            if weight_ptr is not None:
                share *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(inside, share, 0.0), axis=1)
        if best_ptr is not None:
            largest = tl.max(z, axis=1)
            place = tl.min(tl.where(z == largest[:, None], column, words), axis=1)
            best = tl.where(largest > high, place, best)
            high = tl.maximum(high, largest)

    if not WRITE:
        peak = tl.max(reference, axis=0)
        new = tl.where(peak > top + slack, peak, top)
        shift = tl.maximum(reference - new, -1e4)
        shrink = exponential(shift, EXACT)
        others *= shrink
        tilted = (tilted + shift * whole) * shrink
    shift = tl.maximum(top - new, -1e4)
    rescaling = exponential(shift, EXACT)
    if tilted_ptr is not None:
        before = others_before + exponential(z_before - top, EXACT)
        kept = (tl.load(tilted_ptr + token) + shift * before) * rescaling
        tl.store(tilted_ptr + token, kept + tl.sum(tilted, axis=0))
    if total_ptr is not None:
        tl.store(total_ptr + token, tl.load(total_ptr + token) + tl.sum(total, axis=0))
    if best_ptr is not None:
        largest = tl.max(high, axis=0)
        place = tl.min(tl.where(high == largest, best, words), axis=0)
        higher = largest > tl.load(high_ptr + token)
        tl.store(high_ptr + token, largest, mask=higher)
        tl.store(best_ptr + token, first + place.to(tl.int64), mask=higher)
    tl.store(top_ptr + token, new)
    tl.store(factor_ptr + token, rescaling)
    tl.store(others_ptr + token, others_before * rescaling + tl.sum(others, axis=0))
    tl.store(label_ptr + token, z_label, mask=here)
