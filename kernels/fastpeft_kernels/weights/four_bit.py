"""A frozen weight in 4 bits an element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..quant import Packed4bit, decode_4bit
from .base import FrozenWeight, Rows, Stamp, stamp_of


class FourBitWeight(FrozenWeight):
    """An NF4 or FP4 matrix (out_features, in_features) in bitsandbytes' storage, used in place.

    Args:
        packed: the storage; kept by reference, so a later write shows in `stamp`.

    Raises:
        TypeError: `packed` is not a Packed4bit.
    """

    kind = "four_bit"

    def __init__(self, packed: Packed4bit) -> None:
        if not isinstance(packed, Packed4bit):
            raise TypeError(f"packed: expected a Packed4bit, got {type(packed).__name__}")
        self.packed = packed
        self.shape, self.dtype, self.device = packed.shape, packed.dtype, packed.device

    @property
    def storage(self) -> str:
        return "four_bit"  # also where another class reads it

    def decode(self, out: Tensor | None = None, rows: Rows | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return decode_4bit(self.packed, out, rows, dtype)

    def stamp(self) -> Stamp:
        return stamp_of(self.packed.tensors)  # for the host's time, without what `flatten` puts together

    def flatten(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        packed = self.packed
        meta = {
            "shape": list(packed.shape),
            "dtype": str(packed.dtype).removeprefix("torch."),
            "quant_type": packed.quant_type,
            "blocksize": packed.blocksize,
            "nested_blocksize": packed.nested_blocksize,
        }
        return packed.tensors, meta

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor, ...], meta: dict[str, Any]) -> FourBitWeight:
        packed = Packed4bit.from_tensors(
            tensors,
            meta["blocksize"],
            (meta["shape"][0], meta["shape"][1]),
            getattr(torch, meta["dtype"]),
            meta["quant_type"],
            meta["nested_blocksize"],
        )
        return cls(packed)
