"""What readers of quantised layers have in common: how an op takes a base, and what ours is held against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastpeft_kernels.weights import FrozenWeight

PRODUCTS = "fastpeft_fp8"
"""Attribute of a base layer that says how its products are made, in place of its library's; of `layers/fp8.py`."""

Base = tuple[FrozenWeight, torch.dtype, torch.dtype]
"""(weight, dtype of its product, dtype of the result), as the layer itself would have them."""


def dense(layer: Any, values: Tensor) -> nn.Linear:
    """An fp32 nn.Linear of `values`, (out_features, in_features), with a copy of the layer's bias."""
    linear: Any = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(values.detach().float(), requires_grad=False)
    bias = getattr(layer, "bias", None)
    linear.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear  # type: ignore[no-any-return]
