"""PEFT's DoRA: what its layers hold beside LoRA's, read at each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastpeft_kernels.lora import Dtypes, LoraAdapter

from ..layers.bypass import why_not_bypassed
from .transformers import is_conv1d
from .tuner_layers import has_stock_forward, why_not_plain

_VARIANT = ("peft.tuners.lora.variants", "DoraLinearVariant")


def is_dora(variant: Any) -> bool:
    """Whether a LoRA variant is PEFT's own DoRA of a linear layer, and no subclass."""
    return (type(variant).__module__, type(variant).__name__) == _VARIANT


def magnitude(
    layer: Any, adapters: Sequence[LoraAdapter], dtypes: Dtypes, device: torch.device
) -> torch.Tensor | str | None:
    """The trained magnitude of a layer's active adapter, None without DoRA, or why PEFT's own forward must run.

    Args:
        layer: a LoRA layer whose active variants are all DoRA.
        adapters: its active adapters.
        dtypes: of the products.
        device: of the input.
    """
    name = next((name for name in layer.active_adapters if is_dora(layer.lora_variant.get(name))), None)
    if name is None:
        return None
    if len(adapters) != 1:
        return f"adapter {name!r} is DoRA, and others are active with it"
    reason = _why_not(layer, layer.lora_variant[name], layer.lora_magnitude_vector[name], adapters[0], dtypes, device)
    if reason is not None:
        return f"adapter {name!r}: {reason}"
    layer.lora_magnitude_vector[name]._cache_clear()  # as PEFT's own forward: what it kept is of other weights soon
    return layer.lora_magnitude_vector[name]._parameters["weight"]  # type: ignore[no-any-return]


def _why_not(
    layer: Any,
    variant: Any,
    module: Any,
    adapter: LoraAdapter,
    dtypes: Dtypes,
    device: torch.device,
) -> str | None:
    """Why the op cannot be what PEFT computes, or None; `module` holds the magnitude."""
    from peft.tuners.lora import dora as stock

    reason = why_not_bypassed(module, stock.DoraLinearLayer, device) or why_not_plain(
        module._parameters["weight"], device
    )
    if reason is not None:
        return reason
    if not (has_stock_forward(stock.DoraLinearLayer) and has_stock_forward(type(variant))):
        return "the forward of DoRA was replaced by another library"
    if adapter.bias is not None:
        return "DoRA with a bias in lora_B"
    if module.fan_in_fan_out != is_conv1d(layer.get_base_layer()):
        return "a fan_in_fan_out of DoRA that is not the weight's"
    if stock.ENABLE_DORA_CACHING and not module.training:
        return "norms of DoRA are cached (peft.helpers.DoraCaching)"
    if adapter.dropout and not layer.training:
        return "a dropout that is on in a DoRA layer that is in evaluation mode"
    compute, lora = dtypes.compute, dtypes.lora
    if adapter.dropout and torch.promote_types(compute, lora) != compute:
        # There PEFT multiplies what is left of the input with the base weight in the adapters' dtype.
        return f"DoRA with dropout, adapters in {lora}, the base in {compute}, no autocast"
    return None
