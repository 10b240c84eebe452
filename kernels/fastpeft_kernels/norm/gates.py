"""What the Triton kernels of gated norms share: the gate's factor, and its slope."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_factor(gate, SIGMOID: tl.constexpr):
    """sigmoid(gate), or silu(gate), of fp32."""
    factor = 1.0 / (1.0 + tl.exp(-gate))
    if not SIGMOID:
        factor = gate * factor
    return factor


@triton.jit
def gate_slope(gate, SIGMOID: tl.constexpr):
    """Its derivative."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    slope = sigmoid * (1.0 - sigmoid)
    if not SIGMOID:
        slope = sigmoid + gate * slope
    return slope
