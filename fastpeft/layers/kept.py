"""Weights of modules that are kept in other memory than their parameters', and who brings them."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import nn


class Keeper(Protocol):
    """Keeps weights."""

    def ask(self) -> None:
        """Bring them; they stay until others are asked for."""

    def open(self) -> None:
        """The same for somebody who is about to write into them: what they are then is kept."""


KEEPERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""Module with weights of its own -> its `Keeper`."""


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
