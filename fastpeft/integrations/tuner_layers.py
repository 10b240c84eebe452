"""What is asked of any adapter layer of PEFT, whatever its method, before what it holds is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layers.bypass import SHARDED_BY_DEEPSPEED
from ..layers.kept import AWAY, is_elsewhere


def why_not_active(layer: Any) -> str | None:
    """The reason, in the state of a layer of PEFT, why its own forward must run; or None."""
    if layer._disable_adapters:
        return "adapters disabled"
    if layer.merged_adapters:
        return "adapters merged into the base weight"
    return None


def why_not_cast(layer: Any) -> str | None:
    """The reason why a layer's inputs may not be cast; or None."""
    if not getattr(layer, "cast_input_dtype_enabled", True):  # VeRA's have no such switch
        return "casting of inputs disabled (peft.helpers.disable_input_dtype_casting)"
    return None


def why_not_plain(parameter: torch.Tensor | None, device: torch.device) -> str | None:
    """The reason why a parameter cannot be read directly (sharded, offloaded, on another device), or None."""
    if parameter is None:
        return None
    if type(parameter) not in (nn.Parameter, torch.Tensor):
        return AWAY if is_elsewhere(parameter) else f"a parameter of type {type(parameter).__name__}"
    if parameter.device != device:
        return f"a parameter on {parameter.device}, the input on {device}"
    if hasattr(parameter, "ds_id"):
        return SHARDED_BY_DEEPSPEED
    return None


def has_stock_forward(layer_class: type[nn.Module]) -> bool:
    """False when some library has put its own forward into PEFT's class."""
    return getattr(layer_class.forward, "__module__", "").startswith("peft.")
