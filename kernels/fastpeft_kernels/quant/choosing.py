"""Who decodes a 4-bit weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.device import triton_serves
from ..native import native_library
from ..tuning.choosing import choice
from ..tuning.keys import dtype_name
from .storage import Packed4bit

DECODE = "decode_4bit"
CHECKED_ROWS = 1024
"""At most so many are held against fp64."""


class DecodeKey(NamedTuple):
    """Rows and columns that are decoded from NF4 or FP4 into `out` of a dtype, contiguous or part of a wider matrix."""

    rows: int
    columns: int
    quant_type: str
    blocksize: int
    nested: bool
    out: str
    contiguous: bool

    def __str__(self) -> str:
        where = "" if self.contiguous else ", in a wider matrix"
        return f"{self.rows}x{self.columns}, {self.quant_type}, {self.out}{where}"

    def at(self, tokens: int, device: torch.device) -> DecodeKey:
        return self

    def smaller(self) -> DecodeKey:
        return self._replace(rows=min(self.rows, CHECKED_ROWS))


def decode_backend(packed: Packed4bit, out: Tensor) -> str:
    """The backend that "auto" stands for."""
    device = out.device
    return choice(DECODE, device, lambda: decode_key(packed, out), decode_backends, default_backend(device))


def decode_key(packed: Packed4bit, out: Tensor) -> DecodeKey:
    rows, columns = out.shape
    stored = (packed.quant_type, packed.blocksize, packed.nested)
    return DecodeKey(rows, columns, *stored, dtype_name(out.dtype), out.is_contiguous())


def default_backend(device: torch.device) -> str:
    """Where nothing was measured."""
    if triton_serves(device):
        return "triton"
    return "native" if device.type == "cpu" else "torch"


def decode_backends(device: torch.device) -> Sequence[str]:
    """All that can be chosen on a device, plain PyTorch first."""
    if triton_serves(device):
        from .forward import DECODE_NAMES

        return ("torch", *DECODE_NAMES)
    return ("torch", "native") if device.type == "cpu" and native_library() is not None else ("torch",)
