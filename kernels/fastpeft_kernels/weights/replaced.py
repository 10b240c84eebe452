"""A frozen weight of which some rows are replaced."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .base import FrozenWeight, Rows, Stamp, unflatten_weight
from .wrapped import WrappedWeight


class ReplacedRows(WrappedWeight):
    """Another weight's values, but for some rows. Of its chunks only those that hold such rows are copied.

    Equivalent PyTorch: `base.index_copy(0, index, rows)`.

    Args:
        base: the weight; what it has in the rows that are replaced is never multiplied.
        rows: (count, in_features), floating, on base's device; gets no gradient.
        index: (count,) int64 on base's device, ascending, distinct.
        places: the same numbers on the host, so that nothing waits for a device.

    Raises:
        ValueError: sizes that do not fit, or places that do not ascend within base's rows.
    """

    kind = "replaced_rows"
    fills = False  # type: ignore[assignment]

    def __init__(self, base: FrozenWeight, rows: Tensor, index: Tensor, places: Sequence[int]) -> None:
        super().__init__(base)
        if rows.shape != (len(places), base.shape[1]):
            raise ValueError(f"rows: expected shape {(len(places), base.shape[1])}, got {tuple(rows.shape)}")
        if index.shape != (len(places),):
            raise ValueError(f"index: expected shape {(len(places),)}, got {tuple(index.shape)}")
        bounds = (-1, *places, base.shape[0])
        if any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"places: expected ascending integers in [0, {base.shape[0]}), got {tuple(places)}")
        self.rows, self.index, self.places = rows.detach(), index, list(places)

    def decode(self, out: Tensor | None = None, rows: Rows | None = None, dtype: torch.dtype | None = None) -> Tensor:
        first, last = self._check_decode(out, rows)
        values = self.base.decode(out, rows, dtype)
        start, end = bisect_left(self.places, first), bisect_left(self.places, last)
        if start == end:
            return values
        index, new = self.index[start:end] - first, self.rows[start:end].to(values.dtype)
        return values.index_copy(0, index, new) if out is None else values.index_copy_(0, index, new)

    @property
    def selects(self) -> bool:
        return self.base.selects

    def select(self, index: Tensor, out: Tensor | None = None) -> Tensor:
        found = self.base.select(index, out)
        if not self.places:
            return found
        place = torch.searchsorted(self.index, index).clamp_(max=len(self.places) - 1)
        is_new = self.index.index_select(0, place) == index
        new = self.rows.index_select(0, place).to(found.dtype)
        return torch.where(is_new[:, None], new, found, out=found)

    def linear(self, x: Tensor, shared: dict[str, Any] | None = None) -> Tensor:
        """With the whole of base, whose columns are then overwritten: no copy of it is made."""
        y = x @ self.base.decode(dtype=x.dtype).t()
        return y.index_copy_(-1, self.index, x @ self.rows.to(x.dtype).t())

    def ready(self, dtype: torch.dtype) -> Tensor | None:
        return None

    def is_ready(self, dtype: torch.dtype) -> bool:
        return False

    def stamp(self) -> Stamp:
        """The base's: the rows are the caller's, as they were when this was made."""
        return self.base.stamp()

    def flatten(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        tensors, meta = self.base.flatten()
        return (self.rows, self.index, *tensors), {"kind": self.base.kind, "meta": meta, "places": self.places}

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor, ...], meta: dict[str, Any]) -> ReplacedRows:
        rows, index, *stored = tensors
        return cls(unflatten_weight(meta["kind"], tuple(stored), meta["meta"]), rows, index, meta["places"])
