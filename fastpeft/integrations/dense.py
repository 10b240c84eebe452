"""A quantised layer as an ordinary one, for those who hold ours against it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def dense(layer: Any, values: Tensor) -> nn.Linear:
    """An fp32 nn.Linear of `values`, (out_features, in_features), with a copy of the layer's bias."""
    linear: Any = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(values.detach().float(), requires_grad=False)
    bias = getattr(layer, "bias", None)
    linear.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear  # type: ignore[no-any-return]
