"""Whose steps lie between the products."""

from __future__ import annotations

from types import ModuleType

import torch

from . import steps


def steps_of(device: torch.device) -> ModuleType:
    """The module with `online_step`, `gradient_step` and `rescale` for tensors on `device`."""
    return steps
