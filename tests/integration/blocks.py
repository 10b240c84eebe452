"""A bare attention-like module with LoRA, for situations that no real model makes so plain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

import fastpeft
from fastpeft.layers.few_tokens import FEW_ELEMENTS
from tests.integration.models import with_lora

WIDTH = 16
Between = Callable[[Tensor], Any]


class Block(nn.Module):
    """Three projections of one input. `between` is called with it after the first; `skip` leaves the others out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.between: Between = lambda x: None
        self.skip = False

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2  # a tensor of its own: `between` may write into it
        q = self.q(h)
        self.between(h)
        if self.skip:
            return q
        return q * torch.sigmoid(self.k(h)) + self.v(h)


class Stack(nn.Module):
    """Blocks; their input goes through a layer without LoRA first."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h)
        return h


def pair(module: nn.Module | None = None, **config: Any) -> tuple[PeftModel, PeftModel]:
    """(accelerated, plain) with equal values, in training mode; siblings not looked for yet."""
    peft = with_lora(module or Stack(), None, **{"target_modules": ["q", "k", "v"], **config}).train()
    return fastpeft.accelerate(copy.deepcopy(peft)), peft


def blocks(model: nn.Module) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5)), WIDTH)


def many() -> Tensor:
    """Inputs that without gradients are too many tokens to be left to PEFT."""
    return inputs(2, FEW_ELEMENTS // WIDTH)


def gradients(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Output, gradient of x where wanted, and of every trained parameter, for the sum of the squares of the output."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_(x.requires_grad)
    y = (model if forward is None else forward)(x)
    y.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **({} if x.grad is None else {"x": x.grad}), **found}


def assert_same(ours: dict[str, Tensor], peft: dict[str, Tensor]) -> None:
    """fp32 results of two ways to sum a few dozen numbers."""
    assert ours.keys() == peft.keys()
    for name, value in peft.items():
        error = (ours[name].double() - value.double()).norm() / max(value.double().norm().item(), 1e-30)
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def check(ours: nn.Module, peft: nn.Module, x: Tensor | None = None) -> None:
    """Twice: the first forward finds the siblings."""
    x = inputs().requires_grad_() if x is None else x
    expected = gradients(peft, x)
    for _ in range(2):
        assert_same(gradients(ours, x), expected)
