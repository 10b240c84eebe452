"""Products that add to sums in fp32."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..common.shapes import kind_of


def add_product(sums: Tensor, a: Tensor, b: Tensor, begin: bool) -> None:
    """sums (n, m) += a (n, k) b (k, m), or = where `begin`; sums is in the dtype of the factors or a wider one.

    On a GPU the product of 16-bit factors is accumulated in fp32 and added so; elsewhere it is rounded once first.
    """
    if a.dtype == sums.dtype:
        if begin:
            torch.mm(a, b, out=sums)
        else:
            sums.addmm_(a, b)
    elif kind_of(a.device) == "cpu":
        _add(sums, torch.mm(a, b), begin)
    elif sums.dtype != torch.float32:
        _add(sums, torch.mm(a.to(sums.dtype), b.to(sums.dtype)), begin)
    elif begin:
        torch.mm(a, b, out_dtype=sums.dtype, out=sums)
    elif _adds_to_fp32(a.dtype, a.device):
        torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
    else:
        sums.add_(torch.mm(a, b, out_dtype=sums.dtype))


def _add(sums: Tensor, product: Tensor, begin: bool) -> None:
    if begin:
        sums.copy_(product)
    else:
        sums.add_(product)


@lru_cache
def _adds_to_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's addmm takes an fp32 matrix to add a product of 16-bit ones to; its first versions did not."""
    sums, factor = torch.zeros((16, 16), device=device), torch.zeros((16, 16), dtype=dtype, device=device)
    try:
        torch.addmm(sums, factor, factor, out_dtype=torch.float32, out=sums)
    except (RuntimeError, TypeError):
        return False
    return True


def rank_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors of a narrow product in the wider of their dtypes."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)
