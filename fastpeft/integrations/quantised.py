"""Which library stores a base layer that is neither a floating matrix nor bitsandbytes' 4 bits, and how it is read.

A reader is a module of this package. It imports its library never: a layer of a library that was not imported cannot
exist. What a reader cannot read exactly as the library computes it, it refuses with a reason.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..layers.bypass import own_class
from ..layers.kept import stock_type
from . import awq, bitsandbytes_int8, finegrained_fp8, gptq, hqq, torchao
from .reading import Base


class Reader(Protocol):
    """One library's storage."""

    def reads(self, layer: type[nn.Module], weight: type) -> bool:
        """Whether layers of this class with a `weight` of this class are the library's."""

    def name(self, layer: Any) -> str:
        """What the report calls the storage."""

    def frozen_base(self, layer: Any, x: Tensor, autocast: torch.dtype | None) -> Base | str:
        """The layer's weight for x, or the reason why the layer's own forward must run.

        Raises:
            AttributeError, LookupError, TypeError, ValueError: storage that cannot be read.
        """

    def dense_linear(self, layer: Any) -> nn.Linear:
        """The layer with the values that the library itself decodes, in fp32, to hold `frozen_base` against."""


READERS: tuple[Reader, ...] = (bitsandbytes_int8, torchao, hqq, gptq, awq, finegrained_fp8)


_KNOWN: dict[tuple[type, type], Reader | None] = {}  # classes come into being with their library


def reader(layer: nn.Module) -> Reader | None:
    """Who reads the storage of a base layer; None where it is a floating matrix, in 4 bits, or nobody's."""
    weight = layer._parameters.get("weight")
    if weight is not None and stock_type(weight) is nn.Parameter and weight.dtype.itemsize > 1:
        return None
    kinds = own_class(layer), stock_type(weight)
    if kinds not in _KNOWN:
        _KNOWN[kinds] = next((found for found in READERS if found.reads(*kinds)), None)
    return _KNOWN[kinds]


def frozen_base(found: Reader, layer: Any, x: Tensor, autocast: torch.dtype | None) -> Base | str:
    """What the layer's reader makes of it for x; a reason begins with the storage's name."""
    try:
        base = found.frozen_base(layer, x, autocast)
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # another version of the library's, too
        base = f"storage that cannot be read: {error}"
    if not isinstance(base, str):
        weight = base[0]
        if weight.device != x.device:
            base = f"a base weight on {weight.device}, the input on {x.device}"
        elif weight.shape != (layer.out_features, layer.in_features):
            base = f"a weight stored as {weight.shape}"
    return f"{found.name(layer)}: {base}" if isinstance(base, str) else base
