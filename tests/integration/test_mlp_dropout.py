"""MLPs that drop elements between activation and down projection, as T5's: one op, which keeps no mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.layers.mlp import DROPOUT, FastMlp
from fastpeft_kernels.common.random import CounterDropout, draw_seed
from tests.budget import assert_within_budget
from tests.integration.models import batch, checkpointed, make, with_lora
from tests.integration.steps import step

P = 0.3


class Between(nn.Module):
    def __init__(self, p: float = P) -> None:
        super().__init__()
        self.up, self.act, self.drop, self.down = nn.Linear(16, 24), nn.GELU(), nn.Dropout(p), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.up(x))))  # type: ignore[no-any-return]


class After(Between):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.act(self.up(x))))  # type: ignore[no-any-return]


class Before(Between):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.drop(x))))  # type: ignore[no-any-return]


class Twice(Between):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.up(self.drop(x)))))  # type: ignore[no-any-return]


class BeforeTheActivation(Between):
    """Relu gives the very same of a dropout that goes before it; what stands in its place in the proof does not."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.drop(self.up(x))))  # type: ignore[no-any-return]


class OnBothFactors(Between):
    """A square in its place would give the same as one on the product."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.act = nn.Linear(16, 24), nn.SiLU()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.gate(x))) * self.drop(self.up(x)))  # type: ignore[no-any-return]


class BeforeTheSquare(Between):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.up(x).relu()).square())  # type: ignore[no-any-return]


class WhereThereIsOne(Between):
    """Knows its rate, and does without."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        return self.down(self.drop(h) if hasattr(self, "drop") and self.drop.p > 0.0 else h)  # type: ignore[no-any-return]


class ByCounters(nn.Module):
    """In the place of a dropout: the elements that the op drops with this seed."""

    seed: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return CounterDropout.apply(x.reshape(-1, x.shape[-1]), self.seed, P, 0).view(x.shape)


def accelerated(part: nn.Module, targets: list[str]) -> tuple[Any, Any, Any]:
    """A model of the part and what it becomes; its part, and a plain copy of that."""
    model = with_lora(nn.Sequential(part, nn.Linear(16, 16)), None, target_modules=[*targets, "1"]).train()
    plain = copy.deepcopy(model).get_submodule("base_model.model.0")
    return fastpeft.accelerate(model), model.get_submodule("base_model.model.0"), plain


def outcomes(model: nn.Module) -> set[str]:
    return {outcome for m in model.modules() if isinstance(m, FastMlp) for outcome in m.__dict__["fastpeft_calls"]}


def results(part: nn.Module, x: Tensor) -> list[Tensor]:
    y, trained = part(x), [x, *[p for p in part.parameters() if p.requires_grad]]
    return [y, *torch.autograd.grad(y.square().sum(), trained)]


@pytest.mark.parametrize("targets", [["up", "down"], ["down"], []])
def test_the_elements_that_its_seed_says(targets: list[str]) -> None:
    _, ours, plain = accelerated(Between(), targets)
    x = torch.randn(96, 16, requires_grad=True)
    torch.manual_seed(5)
    plain.drop = ByCounters()
    plain.drop.seed = draw_seed(torch.device("cpu"))
    wide = copy.deepcopy(plain).double()
    torch.manual_seed(5)
    found = results(ours, x)
    assert outcomes(ours) == {"fused"}
    exact = results(wide, x.detach().double().requires_grad_())
    for each in zip(found, results(plain, x), exact, strict=True):
        assert_within_budget(*each)


def test_how_many() -> None:
    _, ours, _ = accelerated(Between(), ["down"])
    with torch.no_grad():
        ours.up.weight.zero_()
        ours.up.bias.fill_(1.0)
        ours.down.base_layer.weight.fill_(1.0)
        ours.down.base_layer.bias.zero_()
        ours.down.lora_B["default"].weight.zero_()
        y = ours(torch.randn(4000, 16))[:, 0] / (24 * nn.functional.gelu(torch.tensor(1.0)))
    assert abs(y.mean() - 1.0) < 0.01 and abs(y.std() - (P / (1 - P) / 24) ** 0.5) < 0.01


@pytest.mark.parametrize("part", [After, Before, Twice, BeforeTheActivation, OnBothFactors, BeforeTheSquare])
def test_a_dropout_elsewhere_is_the_module_s(part: type[Between]) -> None:
    model, ours, plain = accelerated(part(), ["up", "down"])
    x = torch.randn(5, 16, requires_grad=True)
    torch.manual_seed(5)
    found = results(ours, x)
    assert outcomes(model) == {f"drop: {DROPOUT}"}
    torch.manual_seed(5)
    for a, b in zip(found, results(plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    model.eval()
    torch.testing.assert_close(ours(x), plain.eval()(x))
    assert "fused" in outcomes(model)


def test_a_dropout_that_is_taken_out() -> None:
    model, ours, _ = accelerated(WhereThereIsOne(), ["up", "down"])
    x = torch.randn(5, 16, requires_grad=True)
    ours(x)
    assert outcomes(model) == {"fused"}
    del ours.drop
    ours(x)
    assert outcomes(model) == {"fused", "other parts than when it was accelerated"}


def test_two_that_share_their_projections() -> None:
    """What was made for one of them is not taken for the other, whose activation is another."""
    first, second = Between(0.0), Between(0.0)
    second.up, second.down, second.act = first.up, first.down, nn.SiLU()  # type: ignore[assignment]
    model = with_lora(nn.Sequential(first, second), None, target_modules=["up", "down"])
    base = model.get_submodule("base_model.model")
    for name in ("up", "down"):
        setattr(base[1], name, getattr(base[0], name))
    plain, x = copy.deepcopy(model), torch.randn(5, 16, requires_grad=True)
    fastpeft.accelerate(model)
    torch.testing.assert_close(model(x), plain(x))
    assert outcomes(model) == {"fused"}


def test_all_dropped() -> None:
    model, ours, _ = accelerated(Between(1.0), ["up", "down"])
    y = ours(torch.randn(5, 16, requires_grad=True))
    assert torch.equal(y, y[:1].expand_as(y)) and outcomes(model) == {f"drop: {DROPOUT}"}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q", "v"]])
def test_checkpointing_drops_the_same(targets: Any, use_reentrant: bool) -> None:
    """Frozen MLPs and few tokens too, whose forward without gradients is the model's own elsewhere."""
    model = make("t5", target_modules=targets)
    for module in model.modules():
        if type(module).__name__ == "T5DenseGatedActDense":
            module.dropout.p = P  # type: ignore[union-attr]
    fastpeft.accelerate(model, attention=False)
    recomputed = checkpointed(copy.deepcopy(model), use_reentrant)
    given = batch(model)
    found = []
    for each in (model, recomputed):
        step(each, given)  # siblings are found
        torch.manual_seed(5)
        found.append(step(each, given))
    assert found[0].loss == found[1].loss and outcomes(model) == outcomes(recomputed) == {"fused"}
    for name, gradient in found[0].gradients.items():  # T5's are summed in another order under checkpointing
        torch.testing.assert_close(found[1].gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_what_is_kept() -> None:
    """Of what is as wide as the activation: the preactivation, no mask and nothing dropped."""
    _, ours, _ = accelerated(Between(), ["up", "down"])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(torch.randn(10, 16, requires_grad=True))
    assert [t.shape for t in kept].count((10, 24)) == 1 and not [t for t in kept if t.dtype == torch.bool]
