"""A frozen weight that is decoded at the first product that reads its values, for all that follow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import FrozenWeight, unflatten_weight
from .held import held
from .wrapped import WrappedWeight


class DecodedOnce(WrappedWeight):
    """Another weight, whose decoded values stay as long as this object: for an op that multiplies many times.

    Args:
        base: the weight; must not change meanwhile.
    """

    kind = "decoded_once"

    def __init__(self, base: FrozenWeight) -> None:
        super().__init__(base)
        self.row_by_row = base.row_by_row
        self._values: dict[torch.dtype, Tensor] = {}

    @property
    def storage(self) -> str:
        return self.base.storage

    def ready(self, dtype: torch.dtype) -> Tensor | None:
        """`is_ready` is the base's: what is made of its answer is then the same for both."""
        found = self._values.get(dtype)
        if found is None:
            found = self.base.ready(dtype)
            found = held(self.base, dtype) if found is None else found
            self._values[dtype] = found = self.base.decode(dtype=dtype) if found is None else found
        return found

    def linear(self, x: Tensor, shared: dict[str, Any] | None = None) -> Tensor | None:
        return self.base.linear(x, shared)

    def linear_t(self, dy: Tensor) -> Tensor | None:
        return self.base.linear_t(dy)

    def flatten(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        tensors, meta = self.base.flatten()
        return tensors, {"kind": self.base.kind, "meta": meta}

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor, ...], meta: dict[str, Any]) -> DecodedOnce:
        return cls(unflatten_weight(meta["kind"], tensors, meta["meta"]))
