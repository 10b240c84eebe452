"""The backward: what it needs of the output, then a kernel for each kind of gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv
from ..common.launching import Launcher
from . import query_ranges
from .arguments import UNSPECIALISED, common_arguments, rows_of, strides_of
from .backward_keys import attention_bwd_keys_kernel
from .backward_queries import attention_bwd_queries_kernel
from .backward_scores import bias_gradient, relative_gradient
from .descriptors import sources
from .gradients import Gradients, Needs
from .masks import Mask
from .relative import in_copies
from .scores import Scores
from .tiles import Tile, Tiles, default_tiles
from .triton_score import LOG2E, load_tile

_ROWS = 64


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_bwd_rows_kernel(
    do_ptr, out_ptr, lse_ptr, lse2_ptr, delta_ptr,
    queries, heads, do_batch, do_head, do_row, o_batch, o_head, o_row,
    UNIT: tl.constexpr, NATURAL: tl.constexpr,
    V_FEATURES: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta, the sum of dout * out over a row, and the rows' lse in the units of the scores, infinite where no key is
    seen, so that all weights of such a row are 0."""
    blocks = tl.cdiv(queries, BLOCK_M)
    stream = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    batch, head = stream // heads, stream % heads
    do = load_tile(
        do_ptr, batch, head, first, do_batch, do_head, do_row, queries, False, UNIT, V_FEATURES, BLOCK_M, BLOCK_V
    )
    out = load_tile(
        out_ptr, batch, head, first, o_batch, o_head, o_row, queries, False, UNIT, V_FEATURES, BLOCK_M, BLOCK_V
    )
    place, inside = stream * queries + row, row < queries
    tl.store(delta_ptr + place, tl.sum(do.to(tl.float32) * out.to(tl.float32), 1), mask=inside)
    lse = tl.load(lse_ptr + place, mask=inside, other=0.0)
    tl.store(
        lse2_ptr + place, tl.where(lse == float("-inf"), float("inf"), lse * (1.0 if NATURAL else LOG2E)), mask=inside
    )


_launch_rows = Launcher(attention_bwd_rows_kernel)
_launch_queries = Launcher(attention_bwd_queries_kernel)
_launch_keys = Launcher(attention_bwd_keys_kernel)


def attention_backward_triton(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    scores: Scores,
    needs: Needs,
    deterministic: bool = False,
    tiles: Tiles | None = None,
) -> Gradients:
    """The gradients that are needed, each by kernels of its own, without atomic additions: the same bits every time.

    Args:
        dout: like `out`, any strides.
        q, k, v, mask, scores: as `forward.attention_triton` was given them.
        out, lse: what it gave.
        needs: which gradients.
        deterministic: true in any case.
        tiles: `tiles.default_tiles` if None.

    Returns:
        Gradients in the shapes and dtypes of the inputs.
    """
    if not (lse.numel() and k.shape[2]):
        return _zeros(q, k, v, scores, needs)
    q, k, v, dout, out = rows_of(q), rows_of(k), rows_of(v), rows_of(dout), rows_of(out)
    batch, heads, queries, _ = q.shape
    keys, v_features = v.shape[2:]
    tiles = tiles or default_tiles(q, v, mask, scores)
    dq = torch.empty_like(q) if needs.q else None
    dk, dv = (torch.empty_like(k), torch.empty_like(v)) if needs.k or needs.v else (None, None)
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    arguments = common_arguments(q, k, v, mask, scores)
    rows = {"lse_ptr": lse2, "delta_ptr": delta}
    _launch_rows(
        q.device, (batch * heads * cdiv(queries, _ROWS),),
        dout, out, lse, lse2, delta, queries, heads, **strides_of(do=dout, o=out),
        NATURAL=arguments["NATURAL"], V_FEATURES=v_features, BLOCK_V=arguments["BLOCK_V"],
        BLOCK_M=_ROWS, num_warps=4,
    )  # fmt: skip
    if dq is not None:
        _launch_queries(
            q.device,
            (batch * heads * cdiv(queries, tiles.queries.block_m),),
            **sources(tiles.queries, q, k, v, dout),
            **rows,
            product_scale=scores.scale,
            dq_ptr=dq,
            **arguments,
            **strides_of(q=q, k=k, v=v, do=dout, dq=dq),
            **_of(tiles.queries),
        )
    if dk is not None and dv is not None:
        ranges = None
        if mask.start is not None and mask.stop is not None:
            ranges = query_ranges.of_blocks(mask.start, mask.stop, keys, tiles.keys.block_n)
        _launch_keys(
            q.device, (batch * k.shape[1] * cdiv(keys, tiles.keys.block_n),),
            **sources(tiles.keys, q, k, v, dout), **rows, product_scale=scores.scale,
            dk_ptr=dk, dv_ptr=dv, ranges_ptr=ranges, **_along_queries(arguments, scores),
            **strides_of(q=q, k=k, v=v, do=dout, dk=dk, dv=dv), **_of(tiles.keys),
        )  # fmt: skip
    relative = bias = None
    if needs.relative or needs.bias:
        common = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "do_ptr": dout, **rows, **arguments}
        common |= strides_of(q=q, k=k, v=v, do=dout)
        if needs.relative and scores.relative is not None:
            relative = relative_gradient(scores.relative, batch, keys, common, tiles.scores)
        if needs.bias and scores.bias is not None:
            bias = bias_gradient(scores.bias, (batch, heads, queries, keys), common, tiles.scores)
    sinks = _sinks(scores.sinks, lse, delta) if needs.sinks and scores.sinks is not None else None
    return Gradients(dq, dk if needs.k else None, dv if needs.v else None, relative, bias, sinks)


def _along_queries(arguments: dict[str, Any], scores: Scores) -> dict[str, Any]:
    """The same for a kernel whose tiles are keys x queries."""
    if scores.relative is None:
        return arguments
    return {**arguments, "relative_ptr": in_copies(scores.relative, reverse=True)}


def _zeros(q: Tensor, k: Tensor, v: Tensor, scores: Scores, needs: Needs) -> Gradients:
    """What comes of no weights at all."""
    inputs = (q, k, v, scores.relative, scores.bias, scores.sinks)
    return Gradients(
        *(torch.zeros_like(t) if t is not None and need else None for t, need in zip(inputs, needs, strict=True))
    )


def _sinks(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    weights = torch.exp(sinks.float()[None, :, None] - lse)  # a row with a sink has a finite lse, unless it is -inf
    return -(weights.masked_fill(lse == -torch.inf, 0.0) * delta).sum((0, 2)).to(sinks.dtype)


def _of(tile: Tile) -> dict[str, Any]:
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    return blocks | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
