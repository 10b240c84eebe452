"""Which rotation it is: what the implementations are told."""

from __future__ import annotations

from typing import NamedTuple

import torch

LAYOUTS = ("halved", "interleaved", "separated")
"""Which elements of x are turned together, see `api.rotary`."""
ANGLES = ("each", "pairs", "half")
"""What an element of cos belongs to, see `api.rotary`."""


class Rotation(NamedTuple):
    """One rotation.

    Attributes:
        layout: one of LAYOUTS.
        angles: one of ANGLES.
        out: the dtype of the results.
    """

    layout: str
    angles: str
    out: torch.dtype

    def turned(self, features: int) -> int:
        """How many elements of a head tables of so many features turn."""
        return 2 * features if self.angles == "half" else features
