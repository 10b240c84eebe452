"""Frozen base weights behind one small protocol."""

from .base import FrozenWeight, unflatten_weight
from .dense import DenseWeight

__all__ = ["DenseWeight", "FrozenWeight", "unflatten_weight"]
