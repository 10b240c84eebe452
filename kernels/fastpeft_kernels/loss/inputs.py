"""How the fused losses read their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.device import autocast_dtype
from ..common.shapes import imitated
from ..weights import DenseWeight, FrozenWeight


def trained_and_stored(weight: FrozenWeight | Tensor) -> tuple[Tensor | None, FrozenWeight | None]:
    """(trained, stored), one of them None."""
    if isinstance(weight, FrozenWeight):
        return None, weight
    return (weight, None) if weight.requires_grad and torch.is_grad_enabled() else (None, DenseWeight(weight.detach()))


def compute_dtype(x: Tensor) -> torch.dtype:
    autocast = None if x.dtype == torch.float64 else autocast_dtype(x.device)
    return autocast or x.dtype


def computed_tokens(counted: Tensor) -> Tensor | None:
    """The tokens that are computed; None for all, also where asking would be an error."""
    if imitated(counted.device):  # nearly all, and not all: a last one predicts none
        return counted.new_empty(counted.shape[0], dtype=torch.int64)
    if counted.device.type == "meta" or (counted.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    index = counted.nonzero()[:, 0]
    return None if index.shape[0] == counted.shape[0] else index
