"""The activations and their slopes as Triton functions, of fp32.

They use nothing but what Triton's interpreter has too. EXACT is for fp32 tensors: exponentials and divisions to the
last bit or two, and 1 - sigmoid that is never a difference. Results of 16 bits hide what is saved without it:
instructions.

The normal distribution's cdf, for gelu, is e^(-x^2/2) t (1/2 + c1 s + ... + c8 s^8) left of zero and one minus that
right of it, where t = 1 / (1 + 0.34 |x|) and s = 1 - t. The coefficients are a minimax fit, of the relative error, to
e^(z^2) erfc(z) / (2 t) with z = |x| / sqrt 2, 0 <= |x| <= 14.5: 3.5e-8. Against 1 + erf(z) it shares the exponential
with the density that backward needs, and keeps its relative accuracy in the tail. native/activation.cpp has the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950408889634)
_LOG2E_REST = tl.constexpr(1.925963033500116e-08)  # what rounding the constant to fp32 leaves out
_LN2 = tl.constexpr(0.6931471805599453)
_TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_TANH_CUBE = tl.constexpr(0.044715)
_QUICK = tl.constexpr(1.702)


@triton.jit
def exp_of_negative(x, EXACT: tl.constexpr):
    """exp(x) for x <= 0."""
    if not EXACT:
        return tl.exp(x)
    # The hardware's exp2 with the rounding of its argument made good, so that the error does not grow with |x|.
    x = tl.where(x < -104.0, -104.0, x)  # NaN stays
    product = x * _LOG2E
    rest = tl.fma(x, _LOG2E_REST, tl.fma(x, _LOG2E, -product))
    power = tl.exp2(product)
    return tl.fma(power, rest * _LN2, power)


@triton.jit
def reciprocal(x, EXACT: tl.constexpr):
    """1 / x for x >= 1."""
    if EXACT:
        return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)
    return 1.0 / x


@triton.jit
def sigmoid_and_rest(x, EXACT: tl.constexpr):
    """sigmoid(x) and 1 - sigmoid(x)."""
    if not EXACT:
        sigmoid = reciprocal(1.0 + tl.exp(-x), EXACT)  # exp may be infinite
        return sigmoid, 1.0 - sigmoid
    e = exp_of_negative(-tl.abs(x), EXACT)
    larger = reciprocal(1.0 + e, EXACT)
    smaller = e * larger
    return tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)


@triton.jit
def normal(x, EXACT: tl.constexpr):
    """The normal distribution's cdf and density."""
    magnitude = tl.abs(x)
    scaled = 0.34 * tl.where(magnitude > 32.0, 32.0, magnitude)  # NaN stays
    t = reciprocal(1.0 + scaled, EXACT)
    s = scaled * t
    p = tl.fma(s, -0.0259407163, 0.0689012557)
    p = tl.fma(p, s, -0.0273074098)
    p = tl.fma(p, s, -0.0305669717)
    p = tl.fma(p, s, -0.0766097009)
    p = tl.fma(p, s, 0.0845903382)
    p = tl.fma(p, s, 0.315915078)
    p = tl.fma(p, s, -0.673360407)
    p = tl.fma(p, s, 0.5)
    e = exp_of_negative(-0.5 * x * x, EXACT)
    tail = e * (p * t)
    return tl.where(x < 0, tail, 1.0 - tail), e * 0.3989422804014327


@triton.jit
def activate(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """act(x) and act'(x). What is not used is not computed; relu's slope is applied by `gradient`."""
    slope = x
    if KIND == "silu":
        sigmoid, rest = sigmoid_and_rest(x, EXACT)
        value = x * sigmoid
        slope = sigmoid * tl.fma(x, rest, 1.0)
    elif KIND == "gelu":
        cdf, density = normal(x, EXACT)
        value = x * cdf
        slope = tl.fma(x, density, cdf)
    elif KIND == "gelu_tanh":
        # 1/2 (1 + tanh(z)) is sigmoid(2 z), which has long been 0 or 1 where the square is cut off.
        square = x * x
        square = tl.where(square > 1e4, 1e4, square)
        sigmoid, rest = sigmoid_and_rest(x * _TANH_SCALE * tl.fma(square, _TANH_CUBE, 1.0), EXACT)
        value = x * sigmoid
        inner = tl.fma(square, _TANH_CUBE * 3, 1.0) * _TANH_SCALE
        slope = tl.fma(x * (sigmoid * rest), inner, sigmoid)
    elif KIND == "quick_gelu":
        sigmoid, rest = sigmoid_and_rest(x * _QUICK, EXACT)
        value = x * sigmoid
        slope = tl.fma(x, sigmoid * rest * _QUICK, sigmoid)
    else:
        tl.static_assert(KIND == "relu" or KIND == "relu2")
        value = tl.where(x < 0, 0.0, x)
        slope = tl.full(x.shape, 1.0, tl.float32)
        if KIND == "relu2":
            value = value * value
            slope = 2.0 * x
    return value, slope


@triton.jit
def gradient(grad, x, slope, KIND: tl.constexpr):
    """The gradient of x from that of act(x). Where relu is zero it is zero, whatever comes in."""
    dx = grad * slope
    if KIND == "relu" or KIND == "relu2":
        dx = tl.where(x <= 0, 0.0, dx)
    return dx
