"""Weights decoded by PyTorch, a block of rows at a time, so that what it takes beside the result stays small."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from .base import FrozenWeight, Rows

BLOCK = 1 << 20
"""Elements that are decoded at once: 4 MiB in fp32, which a CPU's cache holds; a GPU takes 4 times as many."""


class BlockwiseWeight(FrozenWeight):
    """A weight whose storage knows how to decode some of its rows with PyTorch's operations."""

    @abstractmethod
    def decode_rows(self, out: Tensor, first: int, last: int) -> None:
        """Write the rows [first, last) into `out`, (last - first, in_features) of any floating dtype and strides.

        The values are those of fp32, rounded once to `out.dtype`.
        """

    def decode(self, out: Tensor | None = None, rows: Rows | None = None, dtype: torch.dtype | None = None) -> Tensor:
        first, last = self._check_decode(out, rows)
        if out is None:
            out = torch.empty((last - first, self.shape[1]), dtype=dtype or self.dtype, device=self.device)
        with torch.no_grad():
            for start, end in self._blocks(first, last):
                self.decode_rows(out[start - first : end - first], start, end)
        return out

    def _blocks(self, first: int, last: int) -> Iterator[Rows]:
        elements = BLOCK if self.device.type == "cpu" else 4 * BLOCK
        step = max(1, elements // max(1, self.shape[1]))
        return ((start, min(start + step, last)) for start in range(first, last, step))
