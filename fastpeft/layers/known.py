"""What a LoRA layer asked for before, for as long as nothing has changed of which it was made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..integrations import bitsandbytes
from ..integrations.reading import PRODUCTS
from .bypass import is_bare

if TYPE_CHECKING:
    from .requests import Request

Facts = tuple[Any, ...]


class Known:
    """A layer's last request and the facts that it was made of; a copy of the layer, or a pickle, knows none."""

    def __init__(self, facts: Facts | None = None, request: Request | None = None) -> None:
        self.facts, self.request = facts, request

    def __reduce__(self) -> Any:
        return Known, ()


def facts(layer: Any, x: Tensor, autocast: torch.dtype | None) -> Facts | None:
    """All that decides what an ordinary LoRA layer asks for; None where it must be looked into.

    Tensors are named by their ids, which stay theirs as long as a request holds them. Reading all this takes a fifth of
    making the request.

    Args:
        layer: a `FastLoraLayer` of PEFT's class Linear, or Linear4bit.
        x: its input, of a batch that is not mixed.
        autocast: of x's device.
    """
    state = layer.__dict__
    modules = state["_modules"]
    base = modules["base_layer"]
    tensors = base._parameters
    if state["_disable_adapters"] or state["merged_adapters"] or state["lora_variant"]:
        return None
    if "bias" not in tensors or PRODUCTS in base.__dict__ or not is_bare(base, _kind(layer)):
        return None
    found = [x.device, x.dtype, autocast, layer.cast_input_dtype_enabled]
    if layer.over_four_bits:
        frozen = bitsandbytes.frozen_weight(base)  # the same object for the same storage
        if isinstance(frozen, str):
            return None
        found += id(frozen), bitsandbytes.compute_dtype(base, x), base.out_features, base.in_features
    else:
        found += _of(tensors["weight"])
    found += _of(tensors["bias"])
    lora_a, lora_b, dropouts = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
    names = layer._active_adapter  # of which PEFT's `active_adapters` are two properties
    for name in (names,) if type(names) is str else names:
        found.append(name)
        a = lora_a.get(name)
        if a is None:
            continue
        b, dropout, scaling = lora_b[name], dropouts[name], state["scaling"][name]
        if type(dropout) is not nn.Identity:
            if not is_bare(dropout, nn.Dropout):
                return None
            found += dropout.p, dropout.training
        if not is_bare(a, nn.Linear) or not is_bare(b, nn.Linear) or isinstance(scaling, Tensor):
            return None
        tensors = b._parameters
        found.append(scaling)
        found += _of(a._parameters["weight"])
        found += _of(tensors["weight"])
        found += _of(tensors.get("bias"))
    return tuple(found)


def _kind(layer: Any) -> type[nn.Module]:
    kind = bitsandbytes.linear_4bit() if layer.over_four_bits else nn.Linear
    assert kind is not None
    return kind


def _of(tensor: Tensor | None) -> tuple[Any, ...]:
    if tensor is None:
        return (None,)
    away = hasattr(tensor, "ds_id")
    return id(tensor), type(tensor), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, away
