"""Writes that autograd cannot see, because they go through pointers."""

from __future__ import annotations

import torch
from torch import Tensor


def count_writes(*results: Tensor | None) -> None:
    """Each of these has been written to: autograd then refuses a backward that would read what was there before."""
    for result in results:
        if result is not None and not result.is_inference():
            torch.autograd.graph.increment_version(result)
