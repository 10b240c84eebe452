"""Modules of experts with attributes, signatures and numbers that could be taken for something else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import fastpeft
from fastpeft.layers.experts import FastExperts
from fastpeft.layers.experts_structure import ExpertRoles, candidates, proved
from fastpeft_kernels.experts import CLAMPED_SWIGLU
from tests.integration.models import trained
from tests.integration.steps import assert_close

EXPERTS, WIDTH, FEATURES = 4, 8, 12


class Experts(nn.Module):
    """Plain experts with SiLU, but for `between`, a forward of the case's own and attributes that may mean nothing."""

    def __init__(self, between: Callable[..., Tensor] | None = None, **attributes: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * FEATURES, WIDTH) * WIDTH**-0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, FEATURES) * FEATURES**-0.5)
        self.between = between or plain
        self.__dict__.update(attributes)

    def routed(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        up = torch.einsum("tk,tkof,tf->tko", torch.ones_like(weights, dtype=x.dtype), self.gate_up_proj[index], x)
        h = self.between(self, *up.chunk(2, dim=-1))
        y = torch.einsum("tkof,tkf->tko", self.down_proj[index], h)
        return (y * weights.unsqueeze(-1).to(y.dtype)).sum(1)

    def spread(self, x: Tensor) -> Tensor:
        """As many rows for each."""
        rows = x.view(EXPERTS, -1, WIDTH)
        h = self.between(self, *torch.bmm(rows, self.gate_up_proj.mT).chunk(2, dim=-1))
        return torch.bmm(h, self.down_proj.mT).view(-1, WIDTH)

    forward: Callable[..., Tensor] = routed


class OfAny(Experts):
    def forward(self, *args: Any) -> Tensor:
        return self.routed(*args)


class OfAnyByName(Experts):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.routed(x, *args, **kwargs)


class EvenOfAny(Experts):
    def forward(self, *args: Any) -> Tensor:
        return self.spread(*args)


class EvenWithMore(Experts):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.spread(x)


class OfBoth(Experts):
    def forward(self, x: Tensor, index: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.spread(x) if index is None or weights is None else self.routed(x, index, weights)


class WithMore(Experts):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor, scale: float = 1.0) -> Tensor:
        return self.routed(x, index, weights) * scale


def plain(self: Any, gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def clamped(self: Any, gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


def clamped_once(self: Any, gate: Tensor, up: Tensor) -> Tensor:
    return (nn.functional.silu(gate) * up).clamp(-self.limit, self.limit)


MADE: dict[str, tuple[Callable[[], Experts], bool, float | None]] = {
    # name: the module, whether it is even, the limit of its clamp
    "a limit that nothing reaches": (lambda: Experts(limit=1e4), False, None),
    "a limit of something else": (lambda: Experts(token_limit=4096, queue_limit=100.0), False, None),
    "no limit, as a number": (lambda: Experts(limit=3e38), False, None),
    "a wide limit": (lambda: Experts(clamped, limit=5e5), False, 5e5),
    "two limits": (lambda: Experts(clamped, limit=100.0, other_limit=1e6), False, 100.0),
    "a narrow limit, and any alpha": (lambda: Experts(clamped, limit=0.5, lora_alpha=16), False, 0.5),
    "any arguments": (OfAny, False, None),
    "any arguments by name": (OfAnyByName, False, None),
    "any arguments, even": (EvenOfAny, True, None),
    "more by name, even": (EvenWithMore, True, None),
    "even, or not": (OfBoth, False, None),
    "a default more": (WithMore, False, None),
}


@pytest.mark.parametrize("name", MADE)
def test_told_by_what_they_compute(name: str) -> None:
    make, even, limit = MADE[name]
    found = proved(module := make(), candidates(module))
    assert isinstance(found, ExpertRoles), found
    assert found.even is even
    gating = found.gating
    assert (gating.kind, gating.limit) == ((CLAMPED_SWIGLU, limit) if limit else ("silu", 0.0))


@pytest.mark.parametrize("limit", (5.0, 1000.0))
def test_another_clamp_is_left(limit: float) -> None:
    module = Experts(clamped_once, limit=limit)
    assert proved(module, candidates(module)) == "it computes something else than experts"


class Holder(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts, self.linear = experts, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *routing: Tensor) -> Tensor:
        y: Tensor = self.linear(self.experts(x, *routing))
        return y


@pytest.mark.parametrize("name", MADE)
def test_the_same_numbers(name: str) -> None:
    make, even, _ = MADE[name]
    config = LoraConfig(r=2, target_modules=["linear"], target_parameters=["gate_up_proj", "down_proj"])
    model = trained(get_peft_model(Holder(make()), config))  # type: ignore[arg-type]
    plain, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    fastpeft.accelerate(model)
    x, index, weights = torch.randn(8, WIDTH) * 10, torch.rand(8, EXPERTS).topk(2).indices, torch.rand(8, 2)
    routing = () if even else (index, weights)
    dy, results = torch.randn(8, WIDTH), []
    for each in (model, plain, wide):
        leaf = x.to(next(each.parameters()).dtype).clone().requires_grad_()
        y = each(leaf, *routing)
        wanted = [leaf, *(p for p in each.parameters() if p.requires_grad)]
        results.append([y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))])
    for ours, theirs, exact in zip(*results, strict=True):
        assert_close(ours, theirs, exact)
    outer = next(module for module in model.modules() if isinstance(module, FastExperts))
    assert outer.fastpeft_calls == {"fused": 1}
