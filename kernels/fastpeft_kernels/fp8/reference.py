"""The definitions in plain PyTorch: rows in e4m3, and their product, multiplied in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 448.0
"""The largest magnitude of e4m3."""

LEAST = LARGEST * 2.0**-126
"""A row's largest magnitude is taken to be no less, so that scale and its reciprocal are normal fp32 numbers."""


def quantise_rows_reference(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Fill `codes` and `scale`, as `api.quantise_rows` says.

    Args:
        x: (rows, columns), floating.
        codes: (rows, columns), float8_e4m3fn.
        scale: (rows, 1), fp32.
    """
    torch.mul(x.abs().amax(1, keepdim=True).float().clamp(min=LEAST), 1.0 / LARGEST, out=scale)
    codes.copy_(x.float() * scale.reciprocal())


def scaled_product_reference(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, dtype: torch.dtype, wide: torch.dtype = torch.float32
) -> Tensor:
    """`api.scaled_product` by a product of the decoded codes in `wide`, exact but for the sums.

    Args:
        x, w: (tokens, in_features) and (out_features, in_features), float8_e4m3fn.
        x_scale, w_scale: (tokens, 1) and (out_features, 1), fp32.
        dtype: of the result.
        wide: fp32, or fp64 for an oracle.
    """
    return (x.to(wide) @ w.to(wide).t()).mul_(x_scale).mul_(w_scale.t()).to(dtype)
