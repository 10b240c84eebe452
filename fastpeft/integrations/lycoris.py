"""PEFT's LoHa and LoKr layers: what they hold, read at each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.lycoris import LohaAdapter, LokrAdapter

from .tuner_layers import why_not_active, why_not_cast, why_not_plain


def used_adapters(layer: Any, device: torch.device) -> list[LohaAdapter] | list[LokrAdapter] | str:
    """The adapters that a call uses, as the ops take them, or why PEFT's own forward must run.

    In training each is dropped with the probability `module_dropout`, by the same random number as PEFT's.

    Args:
        layer: LoHa or LoKr of PEFT, over a linear layer.
        device: of the input.
    """
    reason = why_not_active(layer) or why_not_cast(layer)
    if reason is not None:
        return reason
    names = [name for name in layer.active_adapters if name in layer._available_adapters]
    for name in names:
        if layer.training and layer.rank_dropout[name]:
            return f"adapter {name!r}: rank_dropout, which drops rows of the update itself"
        for kind in layer.adapter_layer_names:
            reason = why_not_plain(layer._modules[kind]._parameters.get(name), device)
            if reason is not None:
                return f"adapter {name!r}: {reason}"
    read: Callable[[Any, str], Any] = _lokr if hasattr(layer, "lokr_w1") else _loha
    return [read(layer, name) for name in names if not layer.training or torch.rand(1) > layer.module_dropout[name]]


def _loha(layer: Any, name: str) -> LohaAdapter:
    w1_a, w1_b, w2_a, w2_b = (layer.hada_w1_a, layer.hada_w1_b, layer.hada_w2_a, layer.hada_w2_b)
    return LohaAdapter(w1_a[name], w1_b[name], w2_a[name], w2_b[name], layer.scaling[name])


def _lokr(layer: Any, name: str) -> LokrAdapter:
    return LokrAdapter(_matrix(layer, "lokr_w1", name), _matrix(layer, "lokr_w2", name), layer.scaling[name])


def _matrix(layer: Any, kind: str, name: str) -> Tensor:
    """As it is held, or the product of its two factors."""
    whole = getattr(layer, kind)
    if name in whole:
        return whole[name]  # type: ignore[no-any-return]
    return getattr(layer, f"{kind}_a")[name] @ getattr(layer, f"{kind}_b")[name]  # type: ignore[no-any-return]
