"""PEFT's layers whose merges are seen: a pending backward, and copies in FP8, must notice that their base changed."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import nn
from torch.autograd.graph import increment_version


class Keeper(Protocol):
    """Holds weights of modules in other memory than their parameters'."""

    def open(self) -> None:
        """Somebody is about to write into them: bring them, and take what they are then."""


KEEPERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""Module with weights of its own -> its `Keeper`."""


def open_for_writing(module: nn.Module) -> None:
    """Whoever keeps weights of a module elsewhere brings them."""
    found = (KEEPERS.get(part) for part in module.modules()) if KEEPERS else ()
    for keeper in {id(k): k for held in found if held is not None and (k := held()) is not None}.values():
        keeper.open()


class SeenMerges:
    """Mixed in before a PEFT layer class: PEFT merges through `.data`, which torch does not count as a write."""

    def base_parameter(self) -> nn.Parameter | None:
        """What PEFT merges into; None where it puts other storage in its place, and backward keeps the old."""
        raise NotImplementedError

    def merge(self, *args: Any, **kwargs: Any) -> None:
        open_for_writing(self)  # type: ignore[arg-type]
        super().merge(*args, **kwargs)  # type: ignore[misc]
        self._count_write()

    def unmerge(self) -> None:
        open_for_writing(self)  # type: ignore[arg-type]
        super().unmerge()  # type: ignore[misc]
        self._count_write()

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Some ways to begin a new adapter (OLoRA) take it out of the base."""
        open_for_writing(self)  # type: ignore[arg-type]
        super().update_layer(*args, **kwargs)  # type: ignore[misc]
        self._count_write()

    def _count_write(self) -> None:
        parameter = self.base_parameter()
        if parameter is not None and not parameter.is_inference():
            increment_version(parameter)
