"""C++ for the CPU, built with ninja when first used; never required."""

from .build import native_library
from .decode import decode_4bit_native, decode_4bit_refusal
from .dropout import dropout_native
from .skinny import skinny, skinny_serves

__all__ = ["decode_4bit_native", "decode_4bit_refusal", "dropout_native", "native_library", "skinny", "skinny_serves"]
