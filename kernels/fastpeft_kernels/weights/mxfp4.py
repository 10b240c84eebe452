"""A frozen weight in MXFP4: 4-bit floating-point codes, 32 of them along a row with one power of two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .blocks import BlockwiseWeight

GROUP = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""E2M1, by code."""


class Mxfp4Weight(BlockwiseWeight):
    """VALUES[code] * 2 ** (scale - 127); used in place.

    Stacked experts, as gpt-oss has them, are one matrix: their matrices under each other.

    Args:
        codes: uint8 (out_features, in_features / 2); a byte holds two codes, the first in its low nibble.
        scales: uint8 (out_features, in_features / 32), exponents with a bias of 127 (E8M0).
        dtype: of the values; exact in fp32 and bf16, and in fp16 where its range holds them.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: shapes or devices that do not fit each other.

    Source: OCP Microscaling Formats (MX) Specification 1.0, 2023.
    """

    kind = "mxfp4"

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        for name, tensor in (("codes", codes), ("scales", scales)):
            if tensor.dtype != torch.uint8:
                raise TypeError(f"{name}: expected torch.uint8, got {tensor.dtype}")
        if codes.dim() != 2 or (2 * codes.shape[1]) % GROUP:
            raise ValueError(f"codes: expected (out_features, a multiple of {GROUP // 2}), got {tuple(codes.shape)}")
        expected = (codes.shape[0], 2 * codes.shape[1] // GROUP)
        if tuple(scales.shape) != expected:
            raise ValueError(f"scales: expected shape {expected}, got {tuple(scales.shape)}")
        if scales.device != codes.device:
            raise ValueError(f"scales: expected a tensor on {codes.device}, got {scales.device}")
        self.codes, self.scales, self.dtype = codes, scales, dtype
        self.shape = (codes.shape[0], 2 * codes.shape[1])

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.codes.device

    def decode_rows(self, out: Tensor, first: int, last: int) -> None:
        codes = self.codes[first:last]
        pairs = torch.stack((codes & 15, codes >> 4), dim=2).view(last - first, -1, GROUP)
        values = torch.tensor(VALUES, device=self.device)[pairs.int()]
        exponents = self.scales[first:last].int().sub_(127).unsqueeze(2)
        out.copy_(torch.ldexp(values, exponents).view(out.shape))

    def flatten(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        return (self.codes, self.scales), {"dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor, ...], meta: dict[str, Any]) -> Mxfp4Weight:
        codes, scales = tensors
        return cls(codes, scales, getattr(torch, meta["dtype"]))
