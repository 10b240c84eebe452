"""Triton kernels of the divergences between a student's and a teacher's distribution, forward and backward.

On paper, 8192 tokens of 128256 words in bf16: KL either way reads both once, 4.2 GB, 1.25 ms at an H100's 3.35 TB/s; a
mixture is known only when both sums are, so that JSD reads twice what no cache holds, 2.5 ms. Backward reads both and
writes one, 1.9 ms. PyTorch makes some ten tensors of fp32 of them, 4.2 GB each. Not measured yet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import (
    LOWEST,
    block_of_words,
    column_of,
    exponential,
    logits_and_slopes,
    moved_reference,
    within,
)


@triton.jit
def _less_mixture(log_q, log_p, beta, EXACT: tl.constexpr):
    """log q - log m and log p - log m, where m = (1 - beta) q + beta p; what has no probability has no meaning."""
    apart = exponential(-tl.abs(log_q - log_p), EXACT)
    student_larger = log_q > log_p
    of_m = tl.log((1.0 - beta) * tl.where(student_larger, 1.0, apart) + beta * tl.where(student_larger, apart, 1.0))
    larger = tl.maximum(log_q, log_p)
    return (log_q - larger) - of_m, (log_p - larger) - of_m


@triton.jit
def divergence_fwd_kernel(
    student_ptr, teacher_ptr, student_bias_ptr, teacher_bias_ptr, counted_ptr, out_ptr, kept_ptr,
    tokens, words, student_stride, teacher_stride,
    student_factor, student_softcap, teacher_factor, teacher_softcap, beta,
    KIND: tl.constexpr, STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    EXACT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A token. student_ptr, teacher_ptr: (tokens, words), columns contiguous.

    student_bias_ptr, student_factor, student_softcap, STUDENT_CAPPED and the teacher's: `logits_and_slopes` makes
    logits over temperature with them.
    counted_ptr: (tokens,) bool or None: a row that is not counted is not read, and its value is zero.
    out_ptr: (tokens,) fp32. kept_ptr: (5, tokens) fp32, contiguous: for student and teacher the reference point of the
    exponentials and the logarithm of their sum; and the mean under q of what multiplies q in the gradient.
    KIND: "forward" is KL(p || q) with the teacher's p and the student's q, "reverse" KL(q || p), "mixed" beta times
    KL(p || m) plus 1 - beta times KL(q || m).
    """
    token = tl.program_id(0).to(tl.int64)
    out_ptr += token
    kept_ptr += token
    if counted_ptr is not None:  # noqa: SIM102 (told when it is compiled, and when it runs)
        if tl.load(counted_ptr + token) == 0:
            tl.store(out_ptr, 0.0)
            return
    student_ptr += token * student_stride
    teacher_ptr += token * teacher_stride
    columns = block_of_words(LANES, WIDTH)
    top_q = tl.full((LANES,), LOWEST, tl.float32)
    top_p = tl.full((LANES,), LOWEST, tl.float32)
    sum_q = tl.zeros((LANES,), tl.float32)
    sum_p = tl.zeros((LANES,), tl.float32)
    product = tl.zeros((LANES,), tl.float32)  # sum of e_p ((t - top_p) - (s - top_q)), or in reverse
    for start in range(0, words, LANES * WIDTH):
        column = start + columns
        inside = column < words
        partly = start + LANES * WIDTH > words
        s, _slope = logits_and_slopes(
            student_ptr, student_bias_ptr, column, inside, student_factor, student_softcap, STUDENT_CAPPED, EXACT
        )
        s = within(s, inside, partly)
        t, _slope = logits_and_slopes(
            teacher_ptr, teacher_bias_ptr, column, inside, teacher_factor, teacher_softcap, TEACHER_CAPPED, EXACT
        )
        t = within(t, inside, partly)
        top_q, shift_q, shrink_q = moved_reference(top_q, s, EXACT)
        top_p, shift_p, shrink_p = moved_reference(top_p, t, EXACT)
        if KIND == "forward":
            product = (product + (shift_p - shift_q) * sum_p) * shrink_p
        if KIND == "reverse":
            product = (product + (shift_q - shift_p) * sum_q) * shrink_q
        s -= top_q[:, None]
        t -= top_p[:, None]
        e_q = exponential(s, EXACT)
        e_p = exponential(t, EXACT)
        sum_q = sum_q * shrink_q + tl.sum(e_q, axis=1)
        sum_p = sum_p * shrink_p + tl.sum(e_p, axis=1)
        if KIND == "forward":
            product += tl.sum(tl.where(e_p == 0.0, 0.0, e_p * (t - s)), axis=1)
        if KIND == "reverse":
            product += tl.sum(tl.where(e_q == 0.0, 0.0, e_q * (s - t)), axis=1)

    # The lanes' reference points become one of the row.
    row_q = tl.max(top_q, axis=0)
    row_p = tl.max(top_p, axis=0)
    shift_q = tl.maximum(top_q - row_q, -1e4)
    shift_p = tl.maximum(top_p - row_p, -1e4)
    shrink_q = exponential(shift_q, EXACT)
    shrink_p = exponential(shift_p, EXACT)
    whole_q = tl.sum(sum_q * shrink_q, axis=0)
    whole_p = tl.sum(sum_p * shrink_p, axis=0)
    log_q_sum = tl.log(whole_q)
    log_p_sum = tl.log(whole_p)
    centre = 0.0
    if KIND == "forward":
        product = (product + (shift_p - shift_q) * sum_p) * shrink_p
        value = tl.sum(product, axis=0) / whole_p - (log_p_sum - log_q_sum)
    elif KIND == "reverse":
        product = (product + (shift_q - shift_p) * sum_q) * shrink_q
        value = tl.sum(product, axis=0) / whole_q - (log_q_sum - log_p_sum)
        centre = value
    else:
        of_q = tl.zeros((LANES,), tl.float32)
        of_p = tl.zeros((LANES,), tl.float32)
        for start in range(0, words, LANES * WIDTH):
            column = start + columns
            inside = column < words
            partly = start + LANES * WIDTH > words
            s, _slope = logits_and_slopes(
                student_ptr, student_bias_ptr, column, inside, student_factor, student_softcap, STUDENT_CAPPED, EXACT
            )
            log_q = within(s, inside, partly) - row_q - log_q_sum
            t, _slope = logits_and_slopes(
                teacher_ptr, teacher_bias_ptr, column, inside, teacher_factor, teacher_softcap, TEACHER_CAPPED, EXACT
            )
            log_p = within(t, inside, partly) - row_p - log_p_sum
            q_less, p_less = _less_mixture(log_q, log_p, beta, EXACT)
            q = exponential(log_q, EXACT)
            p = exponential(log_p, EXACT)
            of_q += tl.sum(tl.where(q == 0.0, 0.0, q * q_less), axis=1)
            of_p += tl.sum(tl.where(p == 0.0, 0.0, p * p_less), axis=1)
        centre = tl.sum(of_q, axis=0)
        value = beta * tl.sum(of_p, axis=0) + (1.0 - beta) * centre
    tl.store(out_ptr, value)
    distance = tokens.to(tl.int64)
    tl.store(kept_ptr, row_q)
    tl.store(kept_ptr + distance, log_q_sum)
    tl.store(kept_ptr + 2 * distance, row_p)
    tl.store(kept_ptr + 3 * distance, log_p_sum)
    tl.store(kept_ptr + 4 * distance, centre)


@triton.jit
def divergence_bwd_kernel(
    dvalue_ptr, student_ptr, teacher_ptr, student_bias_ptr, teacher_bias_ptr, kept_ptr, dstudent_ptr,
    labels_ptr, top_ptr, inverse_ptr, others_ptr, d_nll_ptr,
    tokens, words, first, kept_stride, student_stride, teacher_stride, dstudent_stride,
    student_factor, student_softcap, teacher_factor, teacher_softcap, temperature, beta,
    KIND: tl.constexpr, STUDENT_CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    EXACT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of a token's row of dstudent_ptr (tokens, words), which may be student_ptr. dvalue_ptr: (tokens,) fp32.

    kept_ptr: (5, tokens), rows kept_stride apart. labels_ptr and the four behind it: `HardLabels`, (tokens,) each, or
    None: the gradient of nll is added, of words whose first is `first`. Others as in forward.
    A row whose dvalue is zero, and d_nll where there is one, gets zeros, and is not read.
    """
    blocks = tl.cdiv(words, LANES * WIDTH)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * (LANES * WIDTH) + block_of_words(LANES, WIDTH)
    inside = column < words
    upstream = tl.load(dvalue_ptr + token) / temperature
    gradient = tl.zeros((LANES, WIDTH), tl.float32)
    d_nll = 0.0
    if d_nll_ptr is not None:
        d_nll = tl.load(d_nll_ptr + token)
    if (upstream != 0.0) | (d_nll != 0.0):
        kept_ptr += token
        distance = kept_stride.to(tl.int64)
        top_q = tl.load(kept_ptr)
        log_q_sum = tl.load(kept_ptr + distance)
        top_p = tl.load(kept_ptr + 2 * distance)
        log_p_sum = tl.load(kept_ptr + 3 * distance)
        s, slope = logits_and_slopes(
            student_ptr + token * student_stride, student_bias_ptr, column, inside,
            student_factor, student_softcap, STUDENT_CAPPED, EXACT,
        )  # fmt: skip
        t, _slope = logits_and_slopes(
            teacher_ptr + token * teacher_stride, teacher_bias_ptr, column, inside,
            teacher_factor, teacher_softcap, TEACHER_CAPPED, EXACT,
        )  # fmt: skip
        log_q = s - top_q - log_q_sum
        log_p = t - top_p - log_p_sum
        q = exponential(log_q, EXACT)
        if KIND == "forward":
            gradient = upstream * (q - exponential(log_p, EXACT))
        else:
            centre = tl.load(kept_ptr + 4 * distance)
            if KIND == "reverse":
                less = log_q - log_p
            else:
                less, _p_less = _less_mixture(log_q, log_p, beta, EXACT)
                upstream *= 1.0 - beta
            gradient = tl.where(q == 0.0, 0.0, upstream * (q * (less - centre)))
        if labels_ptr is not None:
            gradient = tl.where(upstream == 0.0, 0.0, gradient)  # whatever the teacher says
            y = column_of(tl.load(labels_ptr + token), first, words)
            e = exponential(s * temperature - tl.load(top_ptr + token), EXACT) * tl.load(inverse_ptr + token)
            gradient += d_nll * tl.where(column == y, -tl.load(others_ptr + token), e)
        if STUDENT_CAPPED:
            gradient *= slope
    tl.store(dstudent_ptr + token * dstudent_stride + column, gradient.to(dstudent_ptr.dtype.element_ty), mask=inside)
