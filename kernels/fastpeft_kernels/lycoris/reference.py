"""LoHa and LoKr in plain PyTorch, differentiable by autograd: the oracle, and what the ops compute by definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import LohaAdapter, LokrAdapter


def lycoris_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[LohaAdapter | LokrAdapter]
) -> Tensor:
    """x W^T + bias + the sum over the adapters of x update^T, one product for each; shapes as the ops'."""
    y = F.linear(x, weight, bias)
    for adapter in adapters:
        y = y + F.linear(x, update_of(adapter))
    return y


def update_of(adapter: LohaAdapter | LokrAdapter) -> Tensor:
    """(out_features, in_features), scaled."""
    if isinstance(adapter, LohaAdapter):
        return (adapter.w1_a @ adapter.w1_b) * (adapter.w2_a @ adapter.w2_b) * adapter.scaling
    return torch.kron(adapter.w1, adapter.w2) * adapter.scaling
