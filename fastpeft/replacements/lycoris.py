"""PEFT's LoHa and LoKr layers -> the same layers without a product for the update alone."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.bypass import own_class
from ..layers.lycoris import FastLycorisLayer, fast_classes
from .base import Left, Match
from .swap import ClassSwap


class LycorisReplacement(ClassSwap):
    """LoHa and LoKr over nn.Linear."""

    mixture = FastLycorisLayer

    def classes(self) -> dict[type[nn.Module], type[Any]]:
        return fast_classes()

    def match(self, module: nn.Module) -> Match | Left | None:
        matched = super().match(module)
        if matched is not None and own_class(base := module.get_submodule("base_layer")) is not nn.Linear:
            return Left(f"no op for a base layer of type {type(base).__name__}")
        return matched
