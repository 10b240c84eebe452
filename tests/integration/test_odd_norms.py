"""Norms that nearly are one of ours, or are called otherwise: served where the numbers are the same, and only there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.layers import norm as norm_layer
from fastpeft.layers.norm import FastNorm
from fastpeft_kernels.common.shapes import imitating
from fastpeft_kernels.norm.form import gated_form, most_features
from tests.budget import assert_within_budget

WIDTH = 48
EPS = 1e-5


@pytest.fixture(autouse=True)
def however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_layer, "FEW_ON_CPU", dict.fromkeys(norm_layer.FEW_ON_CPU, 0))
    monkeypatch.setattr(norm_layer, "FEW_GATED_ON_CPU", 0)


def normalised(x: Tensor, dim: Any = -1, eps: Any = EPS) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(dim, keepdim=True) + eps)).to(x.dtype)


class Of(nn.Module):
    """The least that has a norm's parts, with a forward of the case's own."""

    def __init__(self, features: int | None = WIDTH, **attributes: Any) -> None:
        super().__init__()
        self.eps = EPS
        if features is not None:
            self.weight = nn.Parameter(torch.randn(features))
        self.__dict__.update(attributes)


def kind(forward: Callable[..., Any], **members: Any) -> type[Of]:
    return type(forward.__name__, (Of,), {"forward": forward, **members})


def fast(module: nn.Module) -> Any:
    return fastpeft.accelerate(nn.ModuleDict({"norm": module}))["norm"]


def same(module: Any, *xs: Tensor, **named: Tensor) -> None:
    """Values and gradients are those of its own forward, within the budget against fp64."""
    plain = fastpeft.restore(copy.deepcopy(module))
    assert not isinstance(plain, FastNorm)
    wide = copy.deepcopy(plain).double()
    results = []
    dy: Any = None
    for each, dtype in ((module, None), (plain, None), (wide, torch.float64)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (*xs, *named.values())]
        y = each(*leaves[: len(xs)], **dict(zip(named, leaves[len(xs) :], strict=True)))
        dy = torch.randn(y.shape) if dy is None else dy
        results.append([y.detach(), *torch.autograd.grad(y, [*leaves, *each.parameters()], dy.to(y.dtype))])
    for ours, theirs, exact in zip(*results, strict=True):
        assert_within_budget(ours, theirs, exact)


def channels(self: Any, x: Tensor) -> Tensor:
    return normalised(x, 1)


def weighted_channels(self: Any, x: Tensor) -> Tensor:
    return normalised(x, 1) * self.weight


def second_to_last(self: Any, x: Tensor) -> Tensor:
    return normalised(x, -2) * self.weight


def all_but_the_batch(self: Any, x: Tensor) -> Tensor:
    return normalised(x, tuple(range(1, x.dim()))) * self.weight


def gated_channels(self: Any, x: Tensor, gate: Tensor) -> Tensor:
    return (normalised(x, 1) * self.weight * nn.functional.silu(gate.float())).to(x.dtype)


def pictures_by_channel(self: Any, x: Tensor) -> Tensor:
    return normalised(x, 1 if x.dim() == 4 else -1) * self.weight


def groups_of_48(self: Any, x: Tensor) -> Tensor:
    return normalised(x.unflatten(-1, (-1, 48))).flatten(-2)


def in_training(self: Any, x: Tensor) -> Tensor:
    return normalised(x) * self.weight if self.training else x * self.weight


def evaluated(self: Any, x: Tensor) -> Tensor:
    return nn.functional.dropout(normalised(x) * self.weight, 0.1, self.training)


def counting(self: Any, x: Tensor) -> Tensor:
    self.seen = x.shape
    return normalised(x) * self.weight


def clamped(self: Any, x: Tensor) -> Tensor:
    return normalised(x).clamp(max=6.0) * self.weight


def clamped_below(self: Any, x: Tensor) -> Tensor:
    return normalised(x).clamp(min=-6.0) * self.weight


def with_a_clamped_gate(self: Any, x: Tensor, gate: Tensor) -> Tensor:
    return (normalised(x) * self.weight * nn.functional.silu(gate.float().clamp(max=10.0))).to(x.dtype)


def writing_to_its_weight(self: Any, x: Tensor) -> Tensor:
    self.weight.data.mul_(0.5)
    return normalised(x) * self.weight


def in_place(self: Any, x: Tensor) -> Tensor:
    y = normalised(x) * self.weight
    x.data.zero_()
    return y


@pytest.mark.parametrize(
    ("forward", "features"),
    [
        (channels, None),
        (weighted_channels, WIDTH),
        (second_to_last, WIDTH),
        (all_but_the_batch, WIDTH),
        (gated_channels, WIDTH),
        (pictures_by_channel, WIDTH),
        (groups_of_48, None),
        (in_training, WIDTH),
        (evaluated, WIDTH),
        (clamped, WIDTH),
        (clamped_below, WIDTH),
        (with_a_clamped_gate, WIDTH),
        (counting, WIDTH),
        (writing_to_its_weight, WIDTH),
        (in_place, WIDTH),
    ],
)
def test_what_is_none_of_ours_is_left(forward: Any, features: int | None) -> None:
    module = kind(forward)(features)
    before = copy.deepcopy(module.state_dict())
    assert not isinstance(fast(module), FastNorm)
    assert all(map(torch.equal, before.values(), module.state_dict().values()))


def test_a_trial_draws_no_random_numbers() -> None:
    module = kind(evaluated)()
    before = torch.random.get_rng_state()
    fast(module)
    assert torch.equal(before, torch.random.get_rng_state())


def of_three(self: Any, x: Tensor) -> Tensor:
    _batch, _tokens, _features = x.shape
    return normalised(x) * self.weight


def of_rows(self: Any, x: Tensor) -> Tensor:
    _rows, _features = x.shape
    return normalised(x) * self.weight


@pytest.mark.parametrize(("forward", "shape"), [(of_three, (2, 3, WIDTH)), (of_rows, (5, WIDTH))])
def test_only_inputs_of_the_dimensions_that_it_takes(forward: Any, shape: tuple[int, ...]) -> None:
    module = fast(kind(forward)())
    same(module, torch.randn(shape))
    with pytest.raises(ValueError):  # its own answer
        module(torch.randn(2, 2, 2, WIDTH))
    assert module.fastpeft_calls == {"fused": 1, "an input of 4 dimensions": 1}


def with_residual(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    y = normalised(x) * self.weight
    return y if residual is None else y + residual


def with_scale(self: Any, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
    y = normalised(x) * self.weight
    return y if scale is None else y * scale


def with_anything(self: Any, x: Tensor, *more: Any, **named: Any) -> Tensor:
    y = normalised(x) * self.weight
    for other in (*more, *named.values()):
        y = y + other
    return y


@pytest.mark.parametrize(
    ("forward", "name"), [(with_residual, "residual"), (with_scale, "scale"), (with_anything, "residual")]
)
def test_what_may_take_more_is_served_where_it_takes_x_alone(forward: Any, name: str) -> None:
    for _ in range(2):  # the second one is known
        module = fast(kind(forward)())
        x, other = torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH)
        same(module, x)
        same(module, x, **{name: other})
        if forward is not with_scale:
            same(module, x, other)
        assert module.fastpeft_calls.pop("fused") == 1
        assert set(module.fastpeft_calls) == {"called with other arguments than x"}


def grouped(self: Any, x: Tensor, gate: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = nn.functional.silu(gate.to(wide))
    given = x.to(wide) if self.norm_before_gate else x.to(wide) * factor
    y = self.weight * normalised(given.unflatten(-1, (self.groups, -1)), eps=self.eps).flatten(-2)
    return (y * factor if self.norm_before_gate else y).to(x.dtype)


@pytest.mark.parametrize(("name", "value"), [("groups", 4), ("norm_before_gate", True)])
def test_a_setting_that_changes_later_is_seen(name: str, value: Any) -> None:
    """And at the next `accelerate` it is proved anew. eps may be any."""
    module = kind(grouped, norm_before_gate=False)(groups=2)
    model: Any = fastpeft.accelerate(nn.ModuleDict({"norm": module}))
    given = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    same(module, *given)
    module.eps = 0.1
    same(module, *given)
    setattr(module, name, value)
    same(module, *given)
    assert module.fastpeft_calls == {"fused": 2, f"{name}: changed since it was accelerated": 1}
    fastpeft.accelerate(model)
    same(module, *given)
    assert module.fastpeft_calls == {"fused": 1}
    module.eps = torch.tensor(0.1)
    same(module, *given)
    assert module.fastpeft_calls == {"fused": 1, "eps: no number": 1}


def test_longer_rows_than_a_kernel_has_registers_for() -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    last, first = (gated_form(bf16, bf16, EPS, "input", before, "silu", 1) for before in (True, False))
    assert most_features(last) == most_features(last, fp32, True) == most_features(first) == 8192
    assert most_features(first, fp32) == most_features(first, trained=True) == 4096
    module = fast(kind(grouped, norm_before_gate=False)(8192, groups=1)).to("meta")
    given = torch.empty(2, 3, 8192, device="meta"), torch.empty(2, 3, 8192, device="meta")
    with imitating("cuda"):
        assert module.why_not(*given) == "a gate of 8192 features, which the kernel has no registers for"
        assert module.requires_grad_(False).why_not(*given) is not None  # in fp32
    with imitating("cpu"):
        assert module.why_not(*given) is None
