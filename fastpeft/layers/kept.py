"""Weights of modules that are kept in other memory than their parameters', and who brings them."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor, nn


class Keeper(Protocol):
    """Keeps weights."""

    def ask(self) -> None:
        """Bring them; they stay until others are asked for."""

    def open(self) -> None:
        """The same for somebody who is about to write into them: what they are then is kept."""


KEEPERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""Module with weights of its own -> its `Keeper`."""


STOCK = "fastpeft_stock"
"""Attribute of the class that a tensor has while its values are elsewhere: the class that it has else."""


AWAY = "a streamed weight outside its layer's turn"
"""Why a library's own forward runs: it reads what `is_elsewhere`."""


def stock_type(tensor: Tensor | None) -> type[Any]:
    """The class of a tensor, wherever its values are at present."""
    kind = type(tensor)
    return getattr(kind, STOCK, kind)


def is_elsewhere(tensor: Tensor | None) -> bool:
    """Whether operations called from Python find the values of a kept tensor, but nothing else does."""
    return hasattr(type(tensor), STOCK)


def bring(module: nn.Module, *, write: bool = False) -> None:
    """Whoever keeps weights of a module, or within it, elsewhere brings them."""
    if not KEEPERS:
        return
    found = {id(keeper): keeper for part in module.modules() if (held := KEEPERS.get(part)) and (keeper := held())}
    for keeper in found.values():
        if write:
            keeper.open()
        else:
            keeper.ask()
