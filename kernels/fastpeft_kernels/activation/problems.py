"""Gated activations as problems to be timed, over the halves of one tensor, as MLPs have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tuning.choosing import forced
from ..tuning.measuring import Tunable
from .api import gated_activation, gated_activation_backward
from .choosing import BACKWARD, FORWARD, ActivationKey, activation_backends
from .reference import gated_activation_reference


class _Activation:
    """Random numbers of the key's sizes."""

    def __init__(self, key: ActivationKey, device: torch.device) -> None:
        self.kind, shape = key.activation, (key.tokens, key.features)
        dtype = getattr(torch, key.dtype)
        pre = torch.randn((key.tokens, (1 + key.gated) * key.features), device=device).to(dtype)
        self.gate, self.up = _halves(pre, key)
        self.dh = torch.randn(shape, device=device).to(dtype)
        self.h, dpre = torch.empty_like(self.dh), torch.empty_like(pre)
        self.dgate, self.dup = _halves(dpre, key)

    def wide(self) -> tuple[Tensor, list[Tensor]]:
        """(result, inputs) in fp64."""
        inputs = [x.double().requires_grad_() for x in (self.gate, self.up) if x is not None]
        return gated_activation_reference(inputs[0] if self.gate is not None else None, inputs[-1], self.kind), inputs


def _halves(pre: Tensor, key: ActivationKey) -> tuple[Tensor | None, Tensor]:
    return (pre[:, : key.features], pre[:, key.features :]) if key.gated else (None, pre)


class _Forward(_Activation):
    def run(self, candidate: str) -> Sequence[Tensor]:
        with forced({FORWARD: candidate}):
            return [gated_activation(self.gate, self.up, self.kind, self.h)]

    def exact(self) -> Sequence[Tensor]:
        return [self.wide()[0].detach()]


class _Backward(_Activation):
    def run(self, candidate: str) -> Sequence[Tensor]:
        with forced({BACKWARD: candidate}):
            gated_activation_backward(self.dh, self.gate, self.up, self.kind, dgate=self.dgate, dup=self.dup, h=self.h)
        return [self.h, *(x for x in (self.dgate, self.dup) if x is not None)]

    def exact(self) -> Sequence[Tensor]:
        h, inputs = self.wide()
        return [h.detach(), *torch.autograd.grad(h, inputs, self.dh.double())]


TUNABLES = (
    Tunable(FORWARD, ActivationKey, activation_backends, _Forward),
    Tunable(BACKWARD, ActivationKey, activation_backends, _Backward),
)
