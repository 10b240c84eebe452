"""Products that add to sums in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(sums: Tensor, a: Tensor, b: Tensor, begin: bool) -> None:
    """sums (n, m) += a (n, k) b (k, m), or = where `begin`; sums is in the dtype of the factors or a wider one.

    On a GPU the product of 16-bit factors is accumulated in fp32 and added so; elsewhere it is rounded once first.
    """
    if a.dtype == sums.dtype:
        if begin:
            torch.mm(a, b, out=sums)
        else:
            sums.addmm_(a, b)
    elif a.device.type == "cuda" and sums.dtype == torch.float32:
        if begin:
            torch.mm(a, b, out_dtype=sums.dtype, out=sums)
        else:
            torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
    elif begin:
        sums.copy_(torch.mm(a, b))
    else:
        sums.add_(torch.mm(a, b))


def rank_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors of a narrow product in the wider of their dtypes."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)
