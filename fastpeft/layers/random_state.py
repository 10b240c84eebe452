"""Random-number generators, as they are at one moment."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain

import torch
from torch import nn


class RandomState:
    """Those of Python, numpy, torch, and some devices.

    Args:
        devices: beside the CPU; see `devices_of`.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._backs: list[Callable[[], object]] = [
            partial(random.setstate, random.getstate()),
            partial(torch.set_rng_state, torch.get_rng_state()),
        ]
        if (numpy := sys.modules.get("numpy")) is not None:
            self._backs.append(partial(numpy.random.set_state, numpy.random.get_state()))
        for device in devices:
            home = getattr(torch, device.type, None)
            if device.type == "mps":  # one device, which its functions do not take
                self._backs.append(partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
            elif home is not None and hasattr(home, "get_rng_state"):
                self._backs.append(partial(home.set_rng_state, home.get_rng_state(device), device))

    def put_back(self) -> None:
        for back in self._backs:
            back()


def devices_of(module: nn.Module) -> list[torch.device]:
    """Those that a module is on, each once, beside the CPU."""
    found = {tensor.device for tensor in chain(module.parameters(), module.buffers())}
    return sorted((device for device in found if device.type not in ("cpu", "meta")), key=str)
