"""A frozen weight of one byte an element, int8 or float8, with scales for rows, groups or blocks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .blocks import BlockwiseWeight

CODES = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


class ScaledWeight(BlockwiseWeight):
    """(codes - zero) * scale * factor, a scale for each block of the matrix; used in place.

    Equivalent PyTorch: `(codes.float() - zero) * (scale * factor)`, both spread over their blocks, in fp32.

    Args:
        codes: (out_features, in_features) of int8, uint8, float8_e4m3fn or float8_e5m2, columns contiguous.
        scale: (row blocks, column blocks) of fp32, bf16, fp16 or float8_e8m0fnu (powers of two); a whole number of
            blocks need not fit: the last ones may be smaller.
        zero: of scale's shape and the dtype of `codes`, int8 or uint8, or None.
        factor: what each scale is multiplied by, in fp32.
        block: (rows, columns) of one block.
        dtype: of the matrix that was quantised.

    Raises:
        TypeError: `codes`, `scale` or `zero` of another dtype.
        ValueError: shapes or devices that do not fit each other.
    """

    kind = "scaled"

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        *,
        block: tuple[int, int],
        dtype: torch.dtype,
        factor: float = 1.0,
    ) -> None:
        if codes.dtype not in CODES:
            raise TypeError(f"codes: expected one of {CODES}, got {codes.dtype}")
        if scale.dtype not in SCALES:
            raise TypeError(f"scale: expected one of {SCALES}, got {scale.dtype}")
        if zero is not None and (zero.dtype != codes.dtype or zero.is_floating_point()):
            raise TypeError(f"zero: expected the integers of the codes, {codes.dtype}, got {zero.dtype}")
        if codes.dim() != 2:
            raise ValueError(f"codes: expected (out_features, in_features), got shape {tuple(codes.shape)}")
        if min(block) < 1:
            raise ValueError(f"block: expected at least one row and one column, got {block}")
        blocks = (-(codes.shape[0] // -block[0]), -(codes.shape[1] // -block[1]))
        for name, tensor in (("scale", scale), ("zero", zero)):
            if tensor is not None and tuple(tensor.shape) != blocks:
                raise ValueError(f"{name}: expected shape {blocks}, got {tuple(tensor.shape)}")
            if tensor is not None and tensor.device != codes.device:
                raise ValueError(f"{name}: expected a tensor on {codes.device}, got {tensor.device}")
        self.codes, self.scale, self.zero = codes, scale, zero
        self.block, self.factor, self.dtype = block, factor, dtype
        self.shape = (codes.shape[0], codes.shape[1])

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.codes.device

    def decode_rows(self, out: Tensor, first: int, last: int) -> None:
        # Codes less zero are integers up to 255, exact in every dtype: the product alone is rounded, out of fp32
        values = out if out.dtype.itemsize <= 4 else torch.empty_like(out, dtype=torch.float32)
        _copy_codes(values, self.codes[first:last])
        grouped = values.unflatten(1, (self.scale.shape[1], self.block[1])) if self._whole_columns() else values
        if self.zero is not None:
            grouped.sub_(self._spread(self.zero, first, last).to(values.dtype))
        stored = self.scale.float() if self.scale.dtype.itemsize == 1 else self.scale  # no operation takes e8m0 itself
        scale = self._spread(stored, first, last).to(torch.float32)
        grouped.mul_(scale if self.factor == 1.0 else scale * self.factor)
        if values is not out:
            out.copy_(values)

    def _whole_columns(self) -> bool:
        """Whether the rows can be seen as (column blocks, columns of one), so that nothing is repeated."""
        return self.shape[1] == self.scale.shape[1] * self.block[1]

    def _spread(self, blocks: Tensor, first: int, last: int) -> Tensor:
        """One for each row in [first, last), and for each column unless one serves all of them or of a block."""
        rows, columns = self.block
        if rows > 1:
            start = first // rows
            spread = blocks[start : -(last // -rows)].repeat_interleave(rows, 0)
            blocks = spread[first - start * rows : last - start * rows]
        else:
            blocks = blocks[first:last]
        if self._whole_columns():
            return blocks.unsqueeze(-1)
        return blocks if blocks.shape[1] == 1 else blocks.repeat_interleave(columns, 1)[:, : self.shape[1]]

    def flatten(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        tensors = (self.codes, self.scale) if self.zero is None else (self.codes, self.scale, self.zero)
        dtype = str(self.dtype).removeprefix("torch.")
        return tensors, {"block": list(self.block), "dtype": dtype, "factor": self.factor}

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor, ...], meta: dict[str, Any]) -> ScaledWeight:
        rows, columns = meta["block"]
        dtype = getattr(torch, meta["dtype"])
        return cls(*tensors, block=(rows, columns), dtype=dtype, factor=meta["factor"])


def _copy_codes(out: Tensor, codes: Tensor) -> None:
    """Each code's value; of float8 on a CPU from a table, because PyTorch converts it element by element there."""
    if codes.device.type != "cpu" or not codes.dtype.is_floating_point or not out.is_contiguous():
        out.copy_(codes)
        return
    index = codes.view(torch.uint8).reshape(-1).to(torch.int32)
    torch.index_select(_float8_values(codes.dtype, out.dtype), 0, index, out=out.view(-1))


@cache
def _float8_values(codes: torch.dtype, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8, device="cpu").view(codes).to(dtype)
