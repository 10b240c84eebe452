"""All adapters of a group cast, scaled and joined by one launch: `parts.pack` in Triton.

Pointers come as arguments, four adapters a launch, which covers the groups of Transformers (q/k/v, gate/up) with an
adapter each; more take another launch. A table of pointers on the device would serve any number, but filling it is a
copy from the host in every forward (from pinned memory that must outlive it, wrong when a CUDA graph replays it after
the parameters moved), and Triton's interpreter cannot follow pointers in memory, so it could not be tested here.

Plan for q/k/v, K = N = 4096, r = 16, fp32 parameters to bf16: 2.4 MB, 0.5 us at 4.8 TB/s; predicted 4 us, one launch in
place of 8. On an H200 torch's profiler saw 22 us for the eight launches of a decoder layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv
from ..common.launching import Launcher
from .parts import summed_bias
from .projection import LoraAdapter, LoraProjection, Packed

_SLOTS = 4
_BLOCK = 1024


@triton.jit
def _pack_one(
    a_ptr, b_ptr, up_ptr, scale_ptr, down_ptr, in_features, rank, out_features, row, up_stride, factor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < rank.to(tl.int64) * in_features
    a = tl.load(a_ptr + index, mask=inside, other=0.0)
    down_ptr += row.to(tl.int64) * in_features
    tl.store(down_ptr + index, a.to(down_ptr.dtype.element_ty), mask=inside)
    inside = index < out_features.to(tl.int64) * rank
    b = tl.load(b_ptr + index, mask=inside, other=0.0)
    if scale_ptr is not None:
        factor = tl.load(scale_ptr).to(tl.float32)
    scaled = (b.to(tl.float32) * factor).to(b.dtype)  # rounded to the parameter's dtype first, as torch does
    n = index // rank
    tl.store(up_ptr + n * up_stride + (index - n * rank), scaled.to(up_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "rank0", "rank1", "rank2", "rank3", "features0", "features1", "features2", "features3",
        "row0", "row1", "row2", "row3", "stride0", "stride1", "stride2", "stride3",
    ]
)  # fmt: skip
def lora_pack_kernel(
    a0, a1, a2, a3, b0, b1, b2, b3, up0, up1, up2, up3, scale0, scale1, scale2, scale3, down_ptr, in_features,
    rank0, rank1, rank2, rank3, features0, features1, features2, features3,
    row0, row1, row2, row3, stride0, stride1, stride2, stride3, factor0, factor1, factor2, factor3,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adapter i of COUNT: a<i> (rank, in_features) to rows row<i> of down; scale * b<i> to up<i>, whose rows are
    stride<i> apart. scale is *scale<i>, or factor<i> where that is None."""
    slot = tl.program_id(1)
    if slot == 0:
        _pack_one(a0, b0, up0, scale0, down_ptr, in_features, rank0, features0, row0, stride0, factor0, BLOCK)
    if COUNT > 1 and slot == 1:
        _pack_one(a1, b1, up1, scale1, down_ptr, in_features, rank1, features1, row1, stride1, factor1, BLOCK)
    if COUNT > 2 and slot == 2:
        _pack_one(a2, b2, up2, scale2, down_ptr, in_features, rank2, features2, row2, stride2, factor2, BLOCK)
    if COUNT > 3 and slot == 3:
        _pack_one(a3, b3, up3, scale3, down_ptr, in_features, rank3, features3, row3, stride3, factor3, BLOCK)


_launch = Launcher(lora_pack_kernel)


def pack(projections: Sequence[LoraProjection], dtype: torch.dtype) -> Packed:
    """`parts.pack`: the same values, in new tensors.

    Args:
        projections: the group; adapters fp16, bf16 or fp32.
        dtype: of the results, likewise.
    """
    total = sum(projection.rank for projection in projections)
    bias = [summed_bias(projection, dtype) for projection in projections]
    if total == 0:
        return Packed(None, [None] * len(projections), bias)
    adapters = [adapter for projection in projections for adapter in projection.adapters]
    first = adapters[0].a
    down = first.new_empty((total, first.shape[1]), dtype=dtype)
    ups: list[Tensor | None] = []
    rooms: list[Tensor] = []  # of each adapter
    for projection in projections:
        count = len(projection.adapters)
        up = first.new_empty((projection.weight.shape[0], projection.rank), dtype=dtype) if count else None
        ups.append(up)
        if up is not None:
            rooms += [up] if count == 1 else up.split([adapter.a.shape[0] for adapter in projection.adapters], dim=1)
    row = 0
    for start in range(0, len(adapters), _SLOTS):
        row = _pack_slots(down, adapters[start : start + _SLOTS], rooms[start : start + _SLOTS], row)
    return Packed(down, ups, bias)


def _pack_slots(down: Tensor, adapters: list[LoraAdapter], rooms: list[Tensor], row: int) -> int:
    """Packs these adapters, up to `_SLOTS`, the first from this row of `down` on; returns the row after the last."""
    in_features, largest = down.shape[1], 0
    columns = []
    for adapter, room in zip(adapters, rooms, strict=True):
        features, rank = adapter.b.shape
        scaling = adapter.scaling_on(down.device)
        scale = (scaling, 1.0) if isinstance(scaling, Tensor) else (None, scaling)
        factors = adapter.a.contiguous(), adapter.b.contiguous(), room, *scale
        columns.append((*factors, rank, features, row, room.stride(0)))
        row += rank
        largest = max(largest, rank * max(in_features, features))
    columns += [columns[0]] * (_SLOTS - len(columns))  # unused slots need some valid argument
    a, b, up, scale, factor, *sizes = zip(*columns, strict=True)
    if largest:
        ranks, out_features, rows, strides = sizes
        _launch(
            down.device,
            (cdiv(largest, _BLOCK), len(adapters)),
            *a, *b, *up, *scale, down, in_features, *ranks, *out_features, *rows, *strides, *factor,
            COUNT=len(adapters),
            BLOCK=_BLOCK,
        )  # fmt: skip
    return row
