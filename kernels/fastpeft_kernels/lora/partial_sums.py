"""The order in which sums over tokens are added: their splits, partial sums, and what adds these up.

No float atomics: the same result every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.integers import cdiv
from ..common.launching import Launcher
from .configs import token_splits
from .forward import stack_strides
from .mixed_rows import RowSlots


@triton.jit(do_not_specialize=["splits", "rows"])
def lora_sum_kernel(
    partial_ptr, out_ptr, factor_ptr, starts_ptr,
    splits, rows, columns,
    partial_split_stride, partial_row_stride, partial_column_stride,
    out_slot_stride, out_row_stride, out_column_stride,
    factor,
    HAS_FACTOR_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = factor * sum of the partial sums, in the order of the splits: the same result every time.

    In a mixed batch program (i, j) sums the splits of slot j, as starts_ptr says; else that is None.
    """
    if starts_ptr is not None:
        first = tl.load(starts_ptr + tl.program_id(1))
        splits = tl.load(starts_ptr + tl.program_id(1) + 1) - first
        partial_ptr += first.to(tl.int64) * partial_split_stride
        out_ptr += tl.program_id(1).to(tl.int64) * out_slot_stride
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = index // columns, index % columns
    mask = row < rows
    ptrs = partial_ptr + row * partial_row_stride + column * partial_column_stride
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(0, splits):
        acc += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += partial_split_stride
    if HAS_FACTOR_TENSOR:
        acc *= tl.load(factor_ptr).to(tl.float32)
    else:
        acc *= factor
    tl.store(out_ptr + row * out_row_stride + column * out_column_stride, acc.to(out_ptr.dtype.element_ty), mask=mask)


_launch = Launcher(lora_sum_kernel)


def lora_sum(partial: Tensor, out: Tensor, factor: float | Tensor = 1.0, starts: Tensor | None = None) -> Tensor:
    """`out[:] = factor * partial.sum(0)`, in the order of the first dimension.

    Args:
        partial: (splits, rows, columns) fp32, any strides.
        out: (rows, columns) to fill, or with `starts` (slots, rows, columns), any floating dtype and strides.
        factor: a number, or a 0-d tensor.
        starts: of `RowSlots.splits`: out[i] is the sum of partial[starts[i] : starts[i + 1]] alone.

    Returns:
        `out`.
    """
    _, rows, columns = partial.shape
    if out.numel() == 0:
        return out
    if isinstance(factor, Tensor) and factor.device != partial.device:
        factor = float(factor)
    is_tensor = isinstance(factor, Tensor)
    _launch(
        partial.device,
        (cdiv(rows * columns, _SUM_BLOCK), 1 if starts is None else out.shape[0]),
        partial, out, factor if is_tensor else None, starts,
        *partial.shape, *partial.stride(), *stack_strides(out), 1.0 if is_tensor else float(factor),
        HAS_FACTOR_TENSOR=is_tensor,
        BLOCK=_SUM_BLOCK,
    )  # fmt: skip
    return out


_SUM_BLOCK = 128
"""One element a thread: with four there were too few loads under way (46 in place of 39 us for 57 MB on an H200)."""


def splits_of(
    tokens: int, blocks: int, block_m: int, device: torch.device, rows: RowSlots | None
) -> tuple[int, int, Tensor | None, Tensor | None]:
    """(splits, tokens of each, their table, starts) of sums over tokens, for `blocks` programs a split; the tables are
    those of `RowSlots.splits`."""
    splits, each = token_splits(tokens, blocks, block_m, device)
    if rows is None:
        return splits, each, None, None
    table, starts = rows.splits(each, block_m, device)
    return table.shape[0], each, table, starts


def sums_of_slots(partial: Tensor, starts: Tensor | None) -> Tensor:
    """(slots, rows, columns) of partial sums (splits, rows, columns), or these where there are no slots."""
    if starts is None:
        return partial
    return lora_sum(partial, partial.new_empty((starts.shape[0] - 1, *partial.shape[1:])), starts=starts)
