"""Memory that runs out at a chosen operation."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SAID = "CUDA out of memory. Tried to allocate 1.50 MiB. GPU 0 has a total capacity of 2.00 MiB"


class Exhausted(TorchDispatchMode):
    """Counts operations, and fails at one.

    Attributes:
        done: operations so far.
        at: the number of the one that fails; 0 for none. It fails once.
        made: what operations made since `at` was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.done = self.at = 0
        self.made: list[weakref.ref[Tensor]] = []

    def fail_after(self, operations: int) -> None:
        self.at, self.made = self.done + operations, []

    def alive(self) -> int:
        return sum(one() is not None for one in self.made)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.done += 1
        if self.done == self.at:
            self.at = 0
            raise torch.OutOfMemoryError(SAID)
        result = func(*args, **(kwargs or {}))
        if self.at and not func._schema.is_mutable:  # an accumulated gradient lives on
            self.made += [weakref.ref(leaf) for leaf in tree_leaves(result) if type(leaf) is Tensor]
        return result
