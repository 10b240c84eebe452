"""C++ for the CPU, built with ninja when first used; never required."""

from .activation import activation_refusal, gated_activation_backward_native, gated_activation_native
from .build import native_library
from .decode import decode_4bit_native, decode_4bit_refusal
from .dropout import dropout_native

__all__ = [
    "activation_refusal",
    "decode_4bit_native",
    "decode_4bit_refusal",
    "dropout_native",
    "gated_activation_backward_native",
    "gated_activation_native",
    "native_library",
]
