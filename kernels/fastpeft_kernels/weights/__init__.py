"""Frozen base weights behind one small protocol."""

from .base import FrozenWeight, unflatten_weight
from .dense import DenseWeight
from .four_bit import FourBitWeight
from .fp8 import Fp8Weight
from .hqq import HqqWeight
from .mxfp4 import Mxfp4Weight
from .once import DecodedOnce
from .packed import PackedWeight
from .replaced import ReplacedRows
from .scaled import ScaledWeight

__all__ = [
    "DecodedOnce",
    "DenseWeight",
    "FourBitWeight",
    "Fp8Weight",
    "FrozenWeight",
    "HqqWeight",
    "Mxfp4Weight",
    "PackedWeight",
    "ReplacedRows",
    "ScaledWeight",
    "unflatten_weight",
]
