"""PEFT's VeRA layers: what they hold, read at each call as the adapters of LoRA that they amount to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastpeft_kernels.lora import LoraAdapter, vera_up

from ..layers.bypass import why_not_bypassed
from .tuner_layers import why_not_active, why_not_cast, why_not_plain


def used_adapters(layer: Any, device: torch.device) -> tuple[LoraAdapter, ...] | str:
    """The adapters that a call uses, as the op takes them, or why PEFT's own forward must run.

    Args:
        layer: VeRA of PEFT.
        device: of the input.
    """
    reason = why_not_active(layer) or why_not_cast(layer)
    if reason is not None:
        return reason
    found = []
    for name in layer.active_adapters:
        if name not in layer.vera_lambda_d:
            continue
        dropout = layer.vera_dropout[name]
        kind = nn.Identity if type(dropout) is nn.Identity else nn.Dropout
        reason = why_not_bypassed(dropout, kind, device)
        lambda_b, lambda_d = layer.vera_lambda_b[name], layer.vera_lambda_d[name]
        a, b = layer.vera_A[name], layer.vera_B[name]
        for tensor in (lambda_b, lambda_d, a, b):
            reason = reason or why_not_plain(tensor, device)
        if reason is not None:
            return f"adapter {name!r}: {reason}"
        if len(dtypes := {tensor.dtype for tensor in (lambda_b, lambda_d, a, b)}) > 1:
            return f"adapters in {sorted(map(str, dtypes))}"
        p = dropout.p if kind is nn.Dropout and dropout.training else 0.0
        if p >= 1.0:
            return f"adapter {name!r}: dropout of {p}"
        if not a.shape[0] == b.shape[1] == lambda_d.shape[0]:
            return f"adapter {name!r}: a rank of {lambda_d.shape[0]}, vera_A of {a.shape[0]}, vera_B of {b.shape[1]}"
        up = vera_up(b[: layer.out_features], lambda_b, lambda_d)
        found.append(LoraAdapter(a[:, : layer.in_features], up, 1.0, None, p))
    return tuple(found)
