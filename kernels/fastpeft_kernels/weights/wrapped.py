"""A frozen weight whose values are another's."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import FrozenWeight, Rows


class WrappedWeight(FrozenWeight):
    """Hands on what is asked of its storage; classes of it add what they have beside it.

    Args:
        base: the weight; read where values are asked for.
    """

    def __init__(self, base: FrozenWeight) -> None:
        self.base, self.shape = base, base.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.base.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.base.device

    @property
    def fills(self) -> bool:  # type: ignore[override]
        return self.base.fills

    def decode(self, out: Tensor | None = None, rows: Rows | None = None, dtype: torch.dtype | None = None) -> Tensor:
        return self.base.decode(out, rows, dtype)

    def ready(self, dtype: torch.dtype) -> Tensor | None:
        return self.base.ready(dtype)

    def is_ready(self, dtype: torch.dtype) -> bool:
        return self.base.is_ready(dtype)

    def prefetch(self) -> None:
        self.base.prefetch()

    def release(self) -> None:
        self.base.release()
