"""PEFT's layers whose merges are seen: a pending backward, and copies in FP8, must notice that their base changed."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.autograd.graph import increment_version

from .kept import bring


class SeenMerges:
    """Mixed in before a PEFT layer class: PEFT merges through `.data`, which torch does not count as a write."""

    def base_parameter(self) -> nn.Parameter | None:
        """What PEFT merges into; None where it puts other storage in its place, and backward keeps the old."""
        raise NotImplementedError

    def merge(self, *args: Any, **kwargs: Any) -> None:
        bring(self, write=True)  # type: ignore[arg-type]
        super().merge(*args, **kwargs)  # type: ignore[misc]
        self._count_write()

    def unmerge(self) -> None:
        bring(self, write=True)  # type: ignore[arg-type]
        super().unmerge()  # type: ignore[misc]
        self._count_write()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Some ways to begin a new adapter (OLoRA) take it out of the base."""
        bring(self, write=True)  # type: ignore[arg-type]
        super().update_layer(*args, **kwargs)  # type: ignore[misc]
        self._count_write()

    def _count_write(self) -> None:
        parameter = self.base_parameter()
        if parameter is not None and not parameter.is_inference():
            increment_version(parameter)
