"""Rotary position embeddings of queries and keys, both in one pass. Does not import Triton."""

from .api import ANGLES, LAYOUTS, rotary

__all__ = ["ANGLES", "LAYOUTS", "rotary"]
