"""Who decodes a 4-bit weight."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.device import triton_serves
from ..tuning.choosing import choice
from ..tuning.keys import dtype_name
from .storage import Packed4bit

DECODE = "decode_4bit"


class DecodeKey(NamedTuple):
    """Rows and columns that are decoded, into `out` of that dtype, contiguous or a part of a wider matrix."""

    rows: int
    columns: int
    blocksize: int
    nested: bool
    out: str
    contiguous: bool

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}, {self.out}{'' if self.contiguous else ', in a wider matrix'}"

    def at(self, tokens: int, device: torch.device) -> DecodeKey:
        return self

    def smaller(self) -> DecodeKey:
        return self


def decode_backend(packed: Packed4bit, out: Tensor) -> str:
    """The backend that "auto" stands for."""
    device = out.device
    return choice(DECODE, device, lambda: decode_key(packed, out), decode_backends, default_backend(device))


def decode_key(packed: Packed4bit, out: Tensor) -> DecodeKey:
    rows, columns = out.shape
    return DecodeKey(rows, columns, packed.blocksize, packed.nested, dtype_name(out.dtype), out.is_contiguous())


def default_backend(device: torch.device) -> str:
    """Where nothing was measured."""
    if triton_serves(device):
        return "triton"
    return "native" if device.type == "cpu" else "torch"


@lru_cache
def decode_backends(device: torch.device) -> Sequence[str]:
    """All that can be chosen on a device, plain PyTorch first."""
    if triton_serves(device):
        from .forward import DECODE_NAMES

        return ("torch", *DECODE_NAMES)
    return ("torch", "native") if device.type == "cpu" else ("torch",)
