"""4-bit weights (NF4, FP4) in bitsandbytes' format. Imports neither bitsandbytes nor Triton."""

from .api import decode_4bit, encode_4bit
from .storage import Packed4bit

__all__ = ["Packed4bit", "decode_4bit", "encode_4bit"]
