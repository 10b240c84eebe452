"""Decoding as a problem to be timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tuning.measuring import Tunable
from .api import encode_4bit
from .choosing import DECODE, DecodeKey, decode_backends
from .custom_op import decode_into
from .reference import decode_4bit_reference

_BESIDE = 16
"""Columns beside those that are filled, where they are a part of a wider matrix."""


class _Decode:
    """A random weight of the key's sizes."""

    def __init__(self, key: DecodeKey, device: torch.device) -> None:
        dtype = getattr(torch, key.out)
        values = torch.randn((key.rows, key.columns), device=device)
        self.packed = encode_4bit(values, key.quant_type, key.blocksize, key.nested)
        beside = 0 if key.contiguous else _BESIDE
        self.out = torch.empty((key.rows, key.columns + beside), dtype=dtype, device=device)[:, : key.columns]

    def run(self, candidate: str) -> Sequence[Tensor]:
        return [decode_into(self.packed, self.out, 0, self.out.shape[0], candidate)]

    def exact(self) -> Sequence[Tensor]:
        wide = torch.empty(self.out.shape, dtype=torch.float64, device=self.out.device)
        return [decode_4bit_reference(self.packed, wide, 0, wide.shape[0])]


TUNABLES = (Tunable(DECODE, DecodeKey, decode_backends, _Decode),)
