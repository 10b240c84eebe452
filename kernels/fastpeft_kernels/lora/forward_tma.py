"""The large product of forward and of dX through Hopper's and Blackwell's tensor descriptors (TMA).

Same result as `lora_linear_fwd_kernel`, for the sum of up to three products, as dX of siblings is: the copy engine
computes the addresses, so that the loop keeps no pointers, four stages of 48 KiB fit, and ragged edges need no masks.
S and B, as further factors, are further steps of the one loop over features: a step reads a block of X and of W, or of
S and of B, through the descriptors that it is at, so that no loop of its own waits for its loads. A rank up to BLOCK_K
costs one step of that width, 1.6 % of 4096 features.

A persistent program takes one tile after the other in a fused loop (`flatten`): while it stores a tile, the loads of
the next are under way. Such kernels reach 92 to 102 % of cuBLAS in the Gluon tutorial on Hopper, pointer kernels about
85 %: only this variant can save more than the fused update is worth. Measured on an H200, 8192 tokens, bf16, over the
bare product of cuBLAS: 0.92 to 1.03 with the update (`tiles.jsonl` of the results), where cuBLAS takes 1.01 to 1.12.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv
from ..common.launching import Launcher
from .configs import Config, multiprocessors, tma_stages


@triton.jit(
    do_not_specialize=["tokens", "out_features", "in_features", "in2_features", "in3_features", "rank", "group_m"]
)
def lora_linear_tma_fwd_kernel(
    x_desc, w_desc, x2_desc, w2_desc, x3_desc, w3_desc, s_desc, b_desc, y_desc, bias_ptr,
    tokens, out_features, in_features, in2_features, in3_features, rank, group_m,
    PAIRS: tl.constexpr, W_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Y = (Y) + X W^T (+ X2 W2^T + X3 W3^T) + S B^T + bias, for PAIRS of X and W.

    Descriptors fill with zeros past the ends and write nothing there. x_desc: blocks (BLOCK_M, BLOCK_K) of X (tokens,
    in_features). w_desc: (BLOCK_N, BLOCK_K) of W (out_features, in_features), or (BLOCK_K, BLOCK_N) of W^T. s_desc,
    b_desc: likewise with ranks in place of features. y_desc: (BLOCK_M, BLOCK_N / PARTS) of Y. One program a tile, or,
    PERSISTENT, as many as there are multiprocessors.
    """
    if PERSISTENT:
        tiles = tl.cdiv(tokens, BLOCK_M) * tl.cdiv(out_features, BLOCK_N)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _one_tile(
                tile, x_desc, w_desc, x2_desc, w2_desc, x3_desc, w3_desc, s_desc, b_desc, y_desc, bias_ptr,
                tokens, out_features, in_features, in2_features, in3_features, rank, group_m,
                PAIRS, W_TRANSPOSED, B_TRANSPOSED, HAS_LORA, HAS_BIAS, ACCUMULATE, BLOCK_M, BLOCK_N, BLOCK_K, PARTS,
            )  # fmt: skip
    else:
        _one_tile(
            tl.program_id(0), x_desc, w_desc, x2_desc, w2_desc, x3_desc, w3_desc, s_desc, b_desc, y_desc, bias_ptr,
            tokens, out_features, in_features, in2_features, in3_features, rank, group_m,
            PAIRS, W_TRANSPOSED, B_TRANSPOSED, HAS_LORA, HAS_BIAS, ACCUMULATE, BLOCK_M, BLOCK_N, BLOCK_K, PARTS,
        )  # fmt: skip


@triton.jit
def _one_tile(
    tile, x_desc, w_desc, x2_desc, w2_desc, x3_desc, w3_desc, s_desc, b_desc, y_desc, bias_ptr,
    tokens, out_features, in_features, in2_features, in3_features, rank, group_m,
    PAIRS: tl.constexpr, W_TRANSPOSED: tl.constexpr, B_TRANSPOSED: tl.constexpr,
    HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Tiles go in groups of `group_m` row blocks, for the second-level cache."""
    down, across = tl.cdiv(tokens, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    group = tile // (group_m * across)
    size = tl.minimum(down - group * group_m, group_m)
    within = tile % (group_m * across)
    m = (group * group_m + within % size) * BLOCK_M
    n = (within // size) * BLOCK_N
    IN_LOOP: tl.constexpr = HAS_LORA and W_TRANSPOSED == B_TRANSPOSED
    one = tl.cdiv(in_features, BLOCK_K)
    two = one + tl.cdiv(in2_features, BLOCK_K)
    three = two + tl.cdiv(in3_features, BLOCK_K)
    steps = three
    if IN_LOOP:
        steps += tl.cdiv(rank, BLOCK_K)
    tl.assume(steps > 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(steps):
        left, right, k = x_desc, w_desc, step
        if PAIRS > 1:  # noqa: SIM102 (known when compiled)
            if step >= one:
                left, right, k = x2_desc, w2_desc, step - one
        if PAIRS > 2:  # noqa: SIM102
            if step >= two:
                left, right, k = x3_desc, w3_desc, step - two
        if IN_LOOP:  # noqa: SIM102
            if step >= three:
                left, right, k = s_desc, b_desc, step - three
        acc = _add_product(acc, left, right, m, n, k * BLOCK_K, W_TRANSPOSED)
    if HAS_LORA and not IN_LOOP:  # blocks of W and B have different shapes
        for r in tl.range(0, rank, BLOCK_K, num_stages=1):
            acc = _add_product(acc, s_desc, b_desc, m, n, r, B_TRANSPOSED)
    _store(y_desc, acc, bias_ptr, m, n, out_features, HAS_BIAS, ACCUMULATE, BLOCK_M, BLOCK_N, PARTS)


@triton.jit
def _add_product(acc, left_desc, right_desc, m, n, k, TRANSPOSED: tl.constexpr):
    left = left_desc.load([m, k])
    if TRANSPOSED:
        right = right_desc.load([k, n])
    else:
        right = right_desc.load([n, k]).T
    return tl.dot(left, right, acc)


@triton.jit
def _store(
    y_desc, acc, bias_ptr, m, n, out_features,
    HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """In PARTS of the columns, one after the other: the less is the shared memory that the loop cannot have."""
    if PARTS == 1:
        if HAS_BIAS:
            at = n + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + at, mask=at < out_features, other=0.0).to(tl.float32)[None, :]
        if ACCUMULATE:
            acc += y_desc.load([m, n]).to(tl.float32)
        y_desc.store([m, n], acc.to(y_desc.dtype))
    else:
        HALF: tl.constexpr = BLOCK_N // 2
        one, two = tl.split(acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1))
        _store(y_desc, one, bias_ptr, m, n, out_features, HAS_BIAS, ACCUMULATE, BLOCK_M, HALF, PARTS // 2)
        _store(y_desc, two, bias_ptr, m, n + HALF, out_features, HAS_BIAS, ACCUMULATE, BLOCK_M, HALF, PARTS // 2)


_launch = Launcher(lora_linear_tma_fwd_kernel)
MOST_PAIRS = 3


def describable(
    pairs: Sequence[tuple[Tensor, Tensor]], out: Tensor, s: Tensor | None = None, b: Tensor | None = None
) -> bool:
    """Whether these operands can have descriptors: one 16-bit dtype (but of `out`), aligned rows, w of one order."""
    factors = [t for pair in pairs for t in pair] + [t for t in (s, b) if t is not None]
    dtype = factors[0].dtype
    if dtype.itemsize != 2 or any([t.dtype != dtype for t in factors]) or len(pairs) > MOST_PAIRS:
        return False
    if len({w.stride(1) != 1 for _, w in pairs}) > 1:
        return False
    left = [x for x, _ in pairs] + ([] if s is None else [s])
    right = [w for _, w in pairs] + ([] if b is None else [b])
    return all([_aligned(t, False) for t in (out, *left)]) and all([_aligned(t, t.stride(1) != 1) for t in right])


def lora_linear_tma(
    pairs: Sequence[tuple[Tensor, Tensor]],
    s: Tensor | None,
    b: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
    config: Config,
) -> Tensor:
    """`lora_linear` for operands that are `describable`, and the sum of up to three products x w^T in place of one."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    rank = 0 if s is None or b is None else s.shape[1]

    def describe(tensor: Tensor | None, rows: int, columns: int) -> TensorDescriptor | None:
        if tensor is None:
            return None
        if tensor.stride(1) == 1:
            return TensorDescriptor(tensor, tensor.shape, tensor.stride(), [rows, columns])
        return TensorDescriptor(tensor, tensor.shape[::-1], tensor.stride()[::-1], [columns, rows])

    described: list[TensorDescriptor | None] = []
    for x, w in pairs:
        described += describe(x, config.block_m, config.block_k), describe(w, config.block_n, config.block_k)
    described += [None] * (2 * MOST_PAIRS - len(described))
    features = [x.shape[1] for x, _ in pairs] + [0] * (MOST_PAIRS - len(pairs))
    (tokens, out_features), w = out.shape, pairs[0][1]
    programs = cdiv(tokens, config.block_m) * cdiv(out_features, config.block_n)
    if config.persistent:
        programs = min(programs, multiprocessors(out.device))
    described += describe(s, config.block_m, config.block_k), describe(b, config.block_n, config.block_k)
    described.append(describe(out, config.block_m, config.block_n // config.parts))
    _launch(
        out.device, (programs,), *described, None if bias is None else bias.contiguous(),
        tokens, out_features, *features, rank, config.group_m,
        PAIRS=len(pairs), W_TRANSPOSED=w.stride(1) != 1, B_TRANSPOSED=b is not None and b.stride(1) != 1,
        HAS_LORA=rank > 0, HAS_BIAS=bias is not None, ACCUMULATE=accumulate,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        PARTS=config.parts, PERSISTENT=config.persistent,
        num_warps=config.num_warps, num_stages=tma_stages(config, out.dtype.itemsize),
    )  # fmt: skip
    return out


def _aligned(tensor: Tensor, turned: bool) -> bool:
    """Whether a matrix, or its transpose, can have a descriptor."""
    (rows, columns), (row, column) = tensor.shape, tensor.stride()
    if turned:
        rows, columns, row, column = columns, rows, column, row
    return (
        0 < rows < 2**31
        and 0 < columns <= row
        and column == 1
        and row * tensor.dtype.itemsize % 16 == 0
        and tensor.data_ptr() % 16 == 0
    )
