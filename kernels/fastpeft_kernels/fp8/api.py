"""Rows in 8-bit floating point, and products of two such matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.device import device_capability, triton_serves
from ..common.validation import check_floating
from .reference import quantise_rows_reference, scaled_product_reference

CAPABILITY = 89
"""The first compute capability whose tensor cores multiply e4m3."""

MULTIPLE = 16
"""The library's product takes rows and columns of the second operand in multiples of this many."""

BACKENDS = ("auto", "torch", "triton")
_PIECE = 1 << 22  # elements that PyTorch quantises at once, which bounds the temporaries


class Fp8Rows(NamedTuple):
    """A matrix of `codes * scale`.

    Attributes:
        codes: (rows, columns) of float8_e4m3fn, contiguous.
        scale: (rows, 1) of fp32.
    """

    codes: Tensor
    scale: Tensor


def fp8_refusal(device: torch.device) -> str | None:
    """What `device` is, where it is none that multiplies in e4m3 (compute capability 8.9 or newer); else None."""
    capability = device_capability(device)
    if capability is None:
        return str(device)
    return None if capability >= CAPABILITY else f"{device} of {capability // 10}.{capability % 10}"


def unfit_shape(shape: tuple[int, int]) -> str | None:
    """Why a weight (out_features, in_features) has no product in e4m3; None when it has one."""
    if all(size > 0 and size % MULTIPLE == 0 for size in shape):
        return None
    return f"{shape[0]} x {shape[1]} features, which are no multiples of {MULTIPLE}"


@torch.no_grad()
def quantise_rows(x: Tensor, backend: str = "auto") -> Fp8Rows:
    """Each row of a matrix in e4m3, with a scale that maps its largest magnitude to 448.

    Equivalent PyTorch: `scale = x.abs().amax(1, keepdim=True).float() / 448`, `codes = (x.float() / scale).to(
    torch.float8_e4m3fn)`; zero rows have codes 0. A row that holds an infinity or NaN has a NaN among its codes, so
    that its products are NaN. Deterministic.

    Args:
        x: (rows, columns), fp32, bf16, fp16 or fp64; any strides.
        backend: "auto", "torch" or "triton" (CUDA, compute capability 8.9 or newer; not fp64).

    Returns:
        `Fp8Rows`.

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: `x` is not a matrix, `backend` is none of the above, or it cannot serve `x`.
    """
    check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected (rows, columns), got shape {tuple(x.shape)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    ours = backend == "triton"
    if backend == "auto":
        ours = x.dtype != torch.float64 and fp8_refusal(x.device) is None and triton_serves(x.device)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        scale.fill_(1.0)
    elif ours:
        from .forward import quantise_rows_triton

        quantise_rows_triton(x if x.stride(1) == 1 else x.contiguous(), codes, scale)
    else:
        step = max(1, _PIECE // x.shape[1])
        for first in range(0, x.shape[0], step):
            piece = slice(first, first + step)
            quantise_rows_reference(x[piece], codes[piece], scale[piece])
    return Fp8Rows(codes, scale)


@torch.no_grad()
def scaled_product(x: Fp8Rows, w: Fp8Rows, dtype: torch.dtype, *, fast_accum: bool = False) -> Tensor:
    """x W^T of two matrices in e4m3.

    Equivalent PyTorch: `((x.codes.float() @ w.codes.float().T) * x.scale * w.scale.T).to(dtype)`, which is what runs
    where the device has no such product. Else it is the library's (`torch._scaled_mm`), rounded to bf16.

    Args:
        x: (tokens, in_features).
        w: (out_features, in_features), both multiples of 16.
        dtype: of the result.
        fast_accum: sums with fewer bits, where the library knows how; faster.

    Returns:
        (tokens, out_features), of `dtype`; infinite or NaN where 448 in_features times the largest of a row is more
        than fp32 holds.

    Raises:
        ValueError: sizes that do not fit each other, or that are no multiples of 16.
    """
    shape = (w.codes.shape[0], w.codes.shape[1])
    if x.codes.shape[1] != shape[1]:
        raise ValueError(f"x: expected {shape[1]} columns like w, got shape {tuple(x.codes.shape)}")
    if (reason := unfit_shape(shape)) is not None:
        raise ValueError(f"w: expected multiples of {MULTIPLE}, got {reason}")
    if x.codes.shape[0] == 0:
        return torch.empty((0, shape[0]), dtype=dtype, device=w.codes.device)
    if fp8_refusal(w.codes.device) is not None:
        return scaled_product_reference(*x, *w, dtype)
    y = torch._scaled_mm(
        x.codes,
        w.codes.t(),
        scale_a=x.scale,
        scale_b=w.scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast_accum,
    )
    return y.to(dtype)
