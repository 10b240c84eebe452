"""PEFT's VeRA layers with a fused forward: LoRA to the op, which keeps nothing as wide as the output."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations import vera
from .fp8 import products_of
from .lora import FastLoraLayer
from .requests import Request
from .siblings import RowNames


class FastVeraLayer(FastLoraLayer):
    """Mixed in before PEFT's VeRA class; all else is as for LoRA."""

    op_name = "vera_linear"
    # VeRA has neither; FastLoraLayer asks for them
    scaling: dict[str, float] = {}  # noqa: RUF012
    lora_variant: dict[str, Any] = {}  # noqa: RUF012

    def used_adapters(self, device: torch.device, row_names: RowNames) -> Any:
        return "a mixed batch" if row_names is not None else vera.used_adapters(self, device)

    def request(self, x: Tensor, row_names: RowNames = None) -> Request | str:
        """As for LoRA, but that the result has the dtype of x under autocast too."""
        found = super().request(x, row_names)
        return found if isinstance(found, str) else replace(found, dtypes=replace(found.dtypes, out=x.dtype))

    def leaves_few(self, x: Tensor) -> bool:
        """PEFT's own forward multiplies two vectors in place of making a matrix of them; drops as ours only if idle."""
        watch = self.fastpeft_watch
        if products_of(self.get_submodule("base_layer")) is not None:
            return False
        layer: Any = self
        return not (self.training and any(type(d) is not nn.Identity for d in layer.vera_dropout.values())) and not (
            watch is not None and watch.watching
        )
