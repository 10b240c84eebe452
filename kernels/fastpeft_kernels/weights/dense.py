"""A frozen weight that is an ordinary matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.validation import check_floating
from ..tuning.keys import dtype_name
from .base import FrozenWeight, Rows, Stamp


class DenseWeight(FrozenWeight):
    """A floating matrix (out_features, in_features), used in place.

    Args:
        weight: the matrix, any floating dtype and strides; kept by reference, so a later write shows in `stamp`.

    Raises:
        TypeError: `weight` is not a floating tensor.
        ValueError: `weight` is not a matrix.
    """

    kind = "dense"

    def __init__(self, weight: Tensor) -> None:
        check_floating("weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"weight: expected (out_features, in_features), got shape {tuple(weight.shape)}")
        self.weight = weight
        self.shape = (weight.shape[0], weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.weight.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.weight.device

    @property
    def storage(self) -> str:
        return dtype_name(self.weight.dtype)

    def decode(self, out: Tensor | None = None, rows: Rows | None = None, dtype: torch.dtype | None = None) -> Tensor:
        first, last = self._check_decode(out, rows)
        values = self.weight.detach()
        if rows is not None:
            values = values[first:last]
        if out is not None:
            return out.copy_(values)
        return values if dtype is None else values.to(dtype)

    def ready(self, dtype: torch.dtype) -> Tensor | None:
        return self.weight.detach() if self.is_ready(dtype) else None

    def is_ready(self, dtype: torch.dtype) -> bool:
        return self.weight.dtype == dtype

    def stamp(self) -> Stamp:
        t = self.weight  # of one tensor, for the host's time
        return ((t.untyped_storage()._cdata, int(t.storage_offset()), 0 if t.is_inference() else t._version),)

    def flatten(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        return (self.weight,), {}

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor, ...], meta: dict[str, Any]) -> DenseWeight:
        return cls(tensors[0])
