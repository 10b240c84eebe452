"""One peer's work as the timer calls it: a direction, on several sets of inputs in turn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import cycle

import torch
from torch import Tensor

from .case import Direction, Forward, Inputs, OpCase

_MOST_COPIES = 16


class Turns:
    """Each call is one direction on the next set of inputs; for "backward" `prepare` runs the forward before.

    Args:
        forwards: of one peer, each with the inputs that it was made of.
        direction: "forward" keeps what backward needs, as in training; where nothing is wanted it has no graph.
    """

    def __init__(self, forwards: Sequence[tuple[Forward, Inputs]], direction: Direction) -> None:
        self.direction = direction
        self._turns = cycle(forwards)
        self._outputs: Sequence[Tensor] = ()

    def prepare(self) -> None:
        self._forward, self._inputs = next(self._turns)
        if self.direction == "backward":
            self._outputs = self._forward()

    def __call__(self) -> None:
        if self.direction == "backward":
            outputs, self._outputs = self._outputs, ()
        else:
            outputs = self._forward()
        if self.direction != "forward":
            torch.autograd.grad(outputs, self._inputs.wanted, self._inputs.dys)


def copies(case: OpCase, device: str) -> int:
    """How many sets of inputs no second-level cache of a GPU can hold, twice over; 1 on a CPU."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    size = min(floor.bytes for floor in case.floors.values())
    return min(_MOST_COPIES, math.ceil(2 * cache / max(size, 1)))
