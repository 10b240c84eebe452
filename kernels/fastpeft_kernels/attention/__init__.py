"""Attention whose memory grows with the number of tokens, not with its square."""

from .api import BACKENDS, attention
from .masks import Mask
from .ranges import causal, chunked, packed, packed_by_index, packed_by_position, padding, prefix

__all__ = [
    "BACKENDS",
    "Mask",
    "attention",
    "causal",
    "chunked",
    "packed",
    "packed_by_index",
    "packed_by_position",
    "padding",
    "prefix",
]
