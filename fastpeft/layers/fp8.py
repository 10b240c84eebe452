"""How the frozen products of a LoRA layer's base are made, where `accelerate(fp8_compute=...)` was asked for.

It hangs on the base layer as an attribute, not a buffer: it is no part of the model's state, and makes its copies of
the weight again where they are missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastpeft_kernels.fp8 import unfit_shape
from fastpeft_kernels.weights import Fp8Weight, FrozenWeight
from fastpeft_kernels.weights.base import Stamp

from ..integrations import finegrained_fp8, quantised
from ..integrations.reading import PRODUCTS
from ..integrations.transformers import is_conv1d
from .bypass import own_class
from .kept import stock_type

NEVER, FORWARD, BOTH = "never", "forward", "both"
SETTINGS = (NEVER, FORWARD, BOTH)


class Fp8Products:
    """How the products of one frozen weight are made.

    Attributes:
        setting: "never": with the decoded weight, also where its library quantises x; "forward": x W^T in FP8;
            "both": dY W too.
    """

    def __init__(self, setting: str) -> None:
        self.setting = setting
        self._made: Fp8Weight | None = None
        self._stamp: Stamp = ()

    def weight(self, base: FrozenWeight) -> FrozenWeight:
        """`base` with products as set; its copies in e4m3 are made again whenever it is not what it was."""
        if self.setting == NEVER or torch.compiler.is_compiling():
            return base
        stamp = base.stamp()
        if self._made is None or self._stamp != stamp:
            self._made = None  # gone before others come
            self._made, self._stamp = Fp8Weight.of(base, self.setting == BOTH), stamp
        return self._made

    def drop(self) -> None:
        """Forget the copies: the weight is about to be moved."""
        self._made = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles have the setting only."""
        return type(self), (self.setting,)


def products_of(base: nn.Module) -> Fp8Products | None:
    """What was asked for a base layer."""
    return base.__dict__.get(PRODUCTS)


def ask(base: nn.Module, setting: str | None) -> None:
    """Have the base's products made so from now on; as ever with None."""
    base.__dict__.pop(PRODUCTS, None)
    if setting is not None:
        base.__dict__[PRODUCTS] = Fp8Products(setting)


@contextmanager
def asked(base: nn.Module, setting: str) -> Iterator[None]:
    """`ask` for a while."""
    before = products_of(base)
    ask(base, setting)
    try:
        yield
    finally:
        ask(base, None)
        if before is not None:
            base.__dict__[PRODUCTS] = before


def is_fp8_linear(base: nn.Module) -> bool:
    """Whether it is transformers' FP8Linear, which multiplies in FP8 by itself."""
    return quantised.reader(base) is finegrained_fp8


def why_not_fp8(base: Any) -> str | None:
    """Why a base layer's products cannot be made in FP8 by us; or None."""
    weight = base._parameters.get("weight")
    dense = (own_class(base) is nn.Linear or is_conv1d(base)) and stock_type(weight) is nn.Parameter
    if not dense and not is_fp8_linear(base):
        return f"a base layer of type {type(base).__name__}"
    if weight.requires_grad:
        return "the base weight is trained"
    shape = weight.shape[::-1] if is_conv1d(base) else weight.shape
    return unfit_shape((shape[0], shape[1]))
