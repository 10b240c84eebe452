"""A frozen weight in HQQ's format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .blocks import BlockwiseWeight

BITS = {1: 8, 2: 4, 3: 10, 4: 2, 8: 1}
"""Bits of a code -> codes in one stored number."""


class HqqWeight(BlockwiseWeight):
    """(codes - zero) * scale in groups along the flat matrix, in HQQ's packing; used in place.

    With R x C codes, a group is a row of them, or a column. The stored number at [i, c] holds the codes [i, c],
    [i + S, c], [i + 2S, c], ... of S stored rows, the first in its highest bits.

    Equivalent PyTorch, for 4 bits: `torch.cat([packed >> 4, packed & 15])` in scale's dtype, minus zero, times scale,
    each rounded to it, and `.reshape(shape)`.

    Args:
        packed: (S, C); int32 for 3 bits, else uint8.
        scale: (R, 1) or (1, C), of the dtype in which HQQ decodes: fp32, bf16 or fp16.
        zero: as scale, need not be integers.
        bits: 1, 2, 3, 4 or 8.
        shape: (out_features, in_features).

    Raises:
        TypeError: `packed`, `scale` or `zero` of another dtype.
        ValueError: `bits`, or sizes or devices that do not fit each other.

    Source: HQQ, Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/; the layout is that of the library, 0.2.8.
    """

    kind = "hqq"

    def __init__(self, packed: Tensor, scale: Tensor, zero: Tensor, bits: int, shape: tuple[int, int]) -> None:
        if bits not in BITS:
            raise ValueError(f"bits: expected one of {sorted(BITS)}, got {bits}")
        stored = torch.int32 if bits == 3 else torch.uint8
        if packed.dtype != stored:
            raise TypeError(f"packed: expected {stored} for {bits} bits, got {packed.dtype}")
        if scale.dtype not in (torch.float32, torch.bfloat16, torch.float16) or zero.dtype != scale.dtype:
            raise TypeError(f"scale, zero: expected one of fp32, bf16 and fp16, got {scale.dtype} and {zero.dtype}")
        size = shape[0] * shape[1]
        columns = packed.shape[1] if packed.dim() == 2 else 0
        rows = size // columns if columns else 0
        if rows * columns != size or -(rows // -BITS[bits]) != packed.shape[0]:
            raise ValueError(f"packed: expected the codes of {shape} in {bits} bits, got shape {tuple(packed.shape)}")
        if scale.shape != zero.shape or tuple(scale.shape) not in ((rows, 1), (1, columns)):
            raise ValueError(
                f"scale, zero: expected shape {(rows, 1)} or {(1, columns)}, "
                f"got {tuple(scale.shape)} and {tuple(zero.shape)}"
            )
        for name, tensor in (("scale", scale), ("zero", zero)):
            if tensor.device != packed.device:
                raise ValueError(f"{name}: expected a tensor on {packed.device}, got {tensor.device}")
        self.packed, self.scale, self.zero, self.bits, self.shape = packed, scale, zero, bits, shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.scale.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.packed.device

    def decode_rows(self, out: Tensor, first: int, last: int) -> None:
        columns = self.packed.shape[1]
        start, end = first * self.shape[1], last * self.shape[1]
        upper, lower = start // columns, -(end // -columns)
        values = self._codes(upper, lower).to(self.dtype)
        values.sub_(self._of_rows(self.zero, upper, lower)).mul_(self._of_rows(self.scale, upper, lower))
        offset = upper * columns
        out.copy_(values.view(-1)[start - offset : end - offset].view(out.shape))

    def _of_rows(self, statistics: Tensor, first: int, last: int) -> Tensor:
        return statistics if statistics.shape[0] == 1 else statistics[first:last]

    def _codes(self, first: int, last: int) -> Tensor:
        """The rows [first, last) of the R x C codes."""
        stored, count, mask = self.packed.shape[0], BITS[self.bits], (1 << self.bits) - 1
        parts = []
        for part in range(first // stored, -(last // -stored)):
            rows = self.packed[max(first - part * stored, 0) : min(last - part * stored, stored)]
            parts.append((rows >> self.bits * (count - 1 - part)) & mask)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def flatten(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        return (self.packed, self.scale, self.zero), {"bits": self.bits, "shape": list(self.shape)}

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor, ...], meta: dict[str, Any]) -> HqqWeight:
        rows, columns = meta["shape"]
        packed, scale, zero = tensors
        return cls(packed, scale, zero, meta["bits"], (rows, columns))
