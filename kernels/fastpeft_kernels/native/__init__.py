"""C++ for the CPU, built with ninja when first used; never required."""

from .build import native_library
from .dropout import dropout_native

__all__ = ["dropout_native", "native_library"]
