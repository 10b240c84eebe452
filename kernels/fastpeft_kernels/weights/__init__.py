"""Frozen base weights behind one small protocol."""

from .base import FrozenWeight, unflatten_weight
from .dense import DenseWeight
from .four_bit import FourBitWeight

__all__ = ["DenseWeight", "FourBitWeight", "FrozenWeight", "unflatten_weight"]
