"""Triton kernel for rotary embeddings: queries and keys, forward or backward, in one pass.

On paper. An element costs a read and a write, 4 bytes in bf16; cos and sin are read again by every block of heads, from
the second-level cache. 8192 tokens with 32 + 8 heads of 128 move 168 MB, for which an H200's 4.8 TB/s need 35 us;
transformers' function takes ten operations that move 32 bytes an element. A program turns a block of heads of one
token, so that any strides of batch, heads and tokens will do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv, next_power_of_2
from ..common.launching import Launcher
from .rotation import Rotation

HEADS = 16
_MOST_TOKENS = 2**31 - 1


@triton.jit
def rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    tokens,
    q_heads,
    k_heads,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    q_out_batch,
    q_out_head,
    q_out_token,
    k_out_batch,
    k_out_head,
    k_out_token,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    DIM: tl.constexpr,
    TURNED: tl.constexpr,
    READS_NEIGHBOURS: tl.constexpr,
    WRITES_NEIGHBOURS: tl.constexpr,
    PAIRS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """A block of heads of one token, of q or of k.

    q_ptr, q_out_ptr: (batch, q_heads, tokens, DIM), k_ptr, k_out_ptr: (batch, k_heads, tokens, DIM), floating, the last
    dimension contiguous; of no heads, None. cos_ptr, sin_ptr: (batch, tokens, TURNED). PAIRS: the first half of these
    has one value for each pair, and only that is read. READS_NEIGHBOURS, WRITES_NEIGHBOURS: whether elements that are
    turned together lie beside each other, before and after; else half of TURNED apart. BLOCK_REST: columns, a power of
    two, from TURNED on, that are copied; or 0.
    """
    token = (tl.program_id(0) % tokens).to(tl.int64)
    batch = (tl.program_id(0) // tokens).to(tl.int64)
    pair = tl.arange(0, BLOCK_PAIRS)
    half: tl.constexpr = TURNED // 2
    used = pair < half
    first = pair
    second = pair + half
    if READS_NEIGHBOURS and WRITES_NEIGHBOURS:
        first = 2 * pair
        second = 2 * pair + 1
    in_table, in_table_too = first, second
    if PAIRS:
        in_table, in_table_too = pair, pair
    cos_row = cos_ptr + batch * cos_batch + token * cos_token
    sin_row = sin_ptr + batch * sin_batch + token * sin_token
    c1 = tl.load(cos_row + in_table, mask=used, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos_row + in_table_too, mask=used, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin_row + in_table, mask=used, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin_row + in_table_too, mask=used, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSED:
        s1, s2 = -s2, -s1

    q_blocks = tl.cdiv(q_heads, BLOCK_HEADS)
    block = tl.program_id(1)
    if block < q_blocks:
        head = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS).to(tl.int64)
        if q_ptr is not None:
            _turn(
                q_ptr + batch * q_batch + token * q_token + head[:, None] * q_head,
                q_out_ptr + batch * q_out_batch + token * q_out_token + head[:, None] * q_out_head,
                (head < q_heads)[:, None], c1, c2, s1, s2,
                TURNED, DIM, READS_NEIGHBOURS, WRITES_NEIGHBOURS, BLOCK_HEADS, BLOCK_PAIRS, BLOCK_REST,
            )  # fmt: skip
    else:
        head = (block - q_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS).to(tl.int64)
        if k_ptr is not None:
            _turn(
                k_ptr + batch * k_batch + token * k_token + head[:, None] * k_head,
                k_out_ptr + batch * k_out_batch + token * k_out_token + head[:, None] * k_out_head,
                (head < k_heads)[:, None], c1, c2, s1, s2,
                TURNED, DIM, READS_NEIGHBOURS, WRITES_NEIGHBOURS, BLOCK_HEADS, BLOCK_PAIRS, BLOCK_REST,
            )  # fmt: skip


@triton.jit
def _turn(
    rows,
    out_rows,
    exists,
    c1,
    c2,
    s1,
    s2,
    TURNED: tl.constexpr,
    DIM: tl.constexpr,
    READS_NEIGHBOURS: tl.constexpr,
    WRITES_NEIGHBOURS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """rows, out_rows: pointers (BLOCK_HEADS, 1) to rows, where `exists`."""
    kind = out_rows.dtype.element_ty
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    used = exists & (pair < TURNED // 2)
    both = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
    used_both = exists & (both < TURNED)
    if READS_NEIGHBOURS:  # together, and taken apart in registers
        x = tl.load(rows + both, mask=used_both, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, (BLOCK_HEADS, BLOCK_PAIRS, 2)))
    else:
        x1 = tl.load(rows + pair, mask=used, other=0.0).to(tl.float32)
        x2 = tl.load(rows + TURNED // 2 + pair, mask=used, other=0.0).to(tl.float32)
    y1 = x1 * c1 - x2 * s1
    y2 = x2 * c2 + x1 * s2
    if WRITES_NEIGHBOURS:
        y = tl.reshape(tl.join(y1, y2), (BLOCK_HEADS, 2 * BLOCK_PAIRS))
        tl.store(out_rows + both, y.to(kind), mask=used_both)
    else:
        tl.store(out_rows + pair, y1.to(kind), mask=used)
        tl.store(out_rows + TURNED // 2 + pair, y2.to(kind), mask=used)
    if BLOCK_REST > 0:
        column = TURNED + tl.arange(0, BLOCK_REST)[None, :]
        inside = exists & (column < DIM)
        tl.store(out_rows + column, tl.load(rows + column, mask=inside, other=0.0).to(kind), mask=inside)


_launch = Launcher(rotary_kernel)


def rotary_triton(
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    rotation: Rotation,
    outs: tuple[Tensor | None, Tensor | None],
    transposed: bool = False,
) -> None:
    """Fill `outs` with q and k turned, or with their gradients if these are the results'; what is None is left out.

    Args:
        q, k, outs: (batch, heads, tokens, dim), not empty, the last dimension contiguous.
        cos, sin: (batch or 1, tokens, as `rotation.angles` says), the last dimension contiguous.

    Raises:
        ValueError: not on a CUDA device (unless Triton interprets), or more tokens than a grid holds.
    """
    given = q if q is not None else k
    assert given is not None
    batch, _, tokens, dim = given.shape
    _check_launch(given, batch * tokens)
    turned = rotation.turned(cos.shape[-1])
    before, after = rotation.layout != "halved", rotation.layout == "interleaved"
    q_heads, k_heads = (0 if x is None else x.shape[1] for x in (q, k))
    rest = next_power_of_2(dim - turned) if dim > turned else 0
    grid = (batch * tokens, cdiv(q_heads, HEADS) + cdiv(k_heads, HEADS))
    strides = [s for x in (q, k, *outs) for s in ((0, 0, 0) if x is None else x.stride()[:3])]
    tables = [s for table in (cos, sin) for s in (0 if table.shape[0] == 1 else table.stride(0), table.stride(1))]
    _launch(
        given.device,
        grid,
        q, k, cos, sin, *outs, tokens, q_heads, k_heads, *strides, *tables,
        DIM=dim,
        TURNED=turned,
        READS_NEIGHBOURS=after if transposed else before,
        WRITES_NEIGHBOURS=before if transposed else after,
        PAIRS=rotation.angles != "each",
        TRANSPOSED=transposed,
        BLOCK_HEADS=HEADS,
        BLOCK_PAIRS=max(1, next_power_of_2(turned // 2)),
        BLOCK_REST=rest,
        num_warps=4,
    )  # fmt: skip


def _check_launch(x: Tensor, rows: int) -> None:
    if isinstance(rotary_kernel, triton.JITFunction):
        if x.device.type != "cuda":
            raise ValueError(f"backend: expected CUDA tensors for 'triton', got tensors on {x.device}")
    elif x.dtype == torch.bfloat16:
        raise ValueError("backend: expected fp32 or fp16 in Triton's interpreter, which computes bfloat16 wrongly")
    if rows > _MOST_TOKENS:
        raise ValueError(f"q: expected at most {_MOST_TOKENS} tokens for 'triton', got {rows}")
