"""Who computes a gated activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.device import triton_serves
from ..native.activation import activation_refusal
from ..tuning.choosing import choice
from ..tuning.keys import CHECKED_TOKENS, bucket, dtype_name

FORWARD, BACKWARD = "gated_activation", "gated_activation_backward"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class ActivationKey(NamedTuple):
    """Tokens are rounded up to a power of two."""

    tokens: int
    features: int
    activation: str
    gated: bool
    dtype: str

    def __str__(self) -> str:
        return f"{self.tokens}x{self.features}, {self.activation}, {self.dtype}{'' if self.gated else ', no gate'}"

    def at(self, tokens: int, device: torch.device) -> ActivationKey:
        return self._replace(tokens=bucket(tokens))

    def smaller(self) -> ActivationKey:
        return self._replace(tokens=min(self.tokens, CHECKED_TOKENS))


def activation_backend(op: str, gate: Tensor | None, up: Tensor, activation: str) -> str:
    """The backend that "auto" stands for."""
    device = up.device
    default = _default(device, up.dtype)
    if up.dtype not in DTYPES or torch.compiler.is_compiling():
        return default
    return choice(op, device, lambda: _key(gate, up, activation), activation_backends, default)


def activation_backends(device: torch.device) -> Sequence[str]:
    """All that can be chosen on a device, plain PyTorch first."""
    if triton_serves(device):
        from .tiles import NAMES

        return ("torch", *NAMES)
    return ("torch",) if activation_refusal(device, torch.float32) else ("torch", "native")


def _default(device: torch.device, dtype: torch.dtype) -> str:
    if dtype in DTYPES and triton_serves(device):
        return "triton"
    return "torch" if activation_refusal(device, dtype) else "native"


def _key(gate: Tensor | None, up: Tensor, activation: str) -> ActivationKey:
    tokens, features = up.shape
    return ActivationKey(bucket(tokens), features, activation, gate is not None, dtype_name(up.dtype))
