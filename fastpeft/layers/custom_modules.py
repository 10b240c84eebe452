"""Our LoRA layers as PEFT's custom modules: `get_peft_model` then builds them in the place of its own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from ..integrations.bitsandbytes import is_linear_4bit
from ..integrations.versions import require_core
from .bypass import own_class
from .kept import stock_type
from .lora import fast_classes

if TYPE_CHECKING:
    from peft import LoraConfig


class _PlainLinear(type):
    """isinstance() means: an nn.Linear with an ordinary weight, no subclass and no quantised tensor in it."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return own_class(instance) is nn.Linear and stock_type(instance._parameters.get("weight")) is nn.Parameter


class PlainLinear(metaclass=_PlainLinear):
    """Key of PEFT's custom-module mapping that matches plain linear layers only."""


class _PlainLinear4bit(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return is_linear_4bit(instance)


class PlainLinear4bit(metaclass=_PlainLinear4bit):
    """Key of PEFT's custom-module mapping that matches bitsandbytes' Linear4bit only."""


def lora_config(config: LoraConfig) -> LoraConfig:
    """A copy of a LoraConfig from which PEFT builds fastpeft's layers directly.

    For whoever never holds the PEFT model before training, such as TRL's `peft_config`. Each layer then runs fused on
    its own; `fastpeft.accelerate(model)` afterwards also joins siblings. The saved adapter is an ordinary one.

    Args:
        config: a `peft.LoraConfig`; left as it is.

    Returns:
        The copy. Targets that are neither plain nn.Linear nor bitsandbytes' Linear4bit get PEFT's own layers.

    Raises:
        ImportError: torch, transformers or peft is missing or older than what fastpeft supports.
        TypeError: `config` is no LoraConfig.
        ValueError: `config` targets parameters (`target_parameters`), which PEFT cannot combine with custom layers.
    """
    require_core()
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected a peft.LoraConfig, got {type(config).__name__}")
    if getattr(config, "target_parameters", None):
        raise ValueError(
            "config: expected no target_parameters; use fastpeft.accelerate(model) on the built model instead"
        )
    copied = copy.deepcopy(config)
    by_name = {fast.__name__: fast for fast in fast_classes().values()}
    mapping: dict[type, type] = {PlainLinear: by_name["FastLinear"]}
    if "FastLinear4bit" in by_name:
        mapping[PlainLinear4bit] = by_name["FastLinear4bit"]
    copied._register_custom_module(mapping)
    return copied
