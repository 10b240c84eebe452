"""Checks of the experts' ops. Messages name the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.validation import FLOATING, check_device, check_floating, check_instance, check_scaling, check_tensor
from ..weights import FrozenWeight
from .gating import CLAMPED_SWIGLU, GATINGS, Gating
from .structure import ExpertAdapter, ExpertProjection, Experts

INTEGERS = (torch.int64, torch.int32)


def check_matrix(x: Any, name: str, features: int) -> None:
    """Raise unless x is a floating matrix of `features` columns."""
    check_floating(name, x)
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a dtype of {FLOATING}, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != features:
        raise ValueError(f"{name}: expected shape (rows, {features}), got {tuple(x.shape)}")


def check_projection(projection: Any, name: str, device: torch.device) -> None:
    """Raise TypeError or ValueError, naming the argument, unless its parts fit each other."""
    check_instance(name, projection, ExpertProjection)
    check_instance(f"{name}.weight", projection.weight, FrozenWeight)
    if type(projection.experts) is not int or projection.experts < 1:
        raise ValueError(f"{name}.experts: expected an integer of at least 1, got {projection.experts!r}")
    if projection.weight.shape[0] % projection.experts or 0 in projection.weight.shape:
        raise ValueError(
            f"{name}.weight: expected {projection.experts} matrices under each other, got {projection.weight.shape}"
        )
    check_device(f"{name}.weight", projection.weight.device, device)
    experts, into, out = projection.experts, projection.in_features, projection.out_features
    if projection.bias is not None:
        check_tensor(f"{name}.bias", projection.bias, device, (experts, out))
        if projection.bias.requires_grad:
            raise ValueError(f"{name}.bias: expected a frozen tensor, got one that requires a gradient")
    check_instance(f"{name}.adapters", projection.adapters, tuple)
    for i, adapter in enumerate(projection.adapters):
        where = f"{name}.adapters[{i}]"
        check_instance(where, adapter, ExpertAdapter)
        check_instance(f"{where}.a", adapter.a, Tensor)
        if adapter.a.dim() != 3 or adapter.rank < 1:
            raise ValueError(f"{where}.a: expected ({experts}, rank >= 1, {into}), got {tuple(adapter.a.shape)}")
        check_tensor(f"{where}.a", adapter.a, device, (experts, adapter.rank, into))
        check_tensor(f"{where}.b", adapter.b, device, (experts, out, adapter.rank))
        if adapter.b.dtype != adapter.a.dtype:
            raise TypeError(f"{where}.b: expected the dtype of a, {adapter.a.dtype}, got {adapter.b.dtype}")
        check_scaling(f"{where}.scaling", adapter.scaling, device)


def check_experts(x: Any, index: Any, weights: Any, experts: Any) -> None:
    """Raise TypeError or ValueError, naming the argument, unless all fit each other."""
    check_instance("experts", experts, Experts)
    check_floating("x", x)
    inner, down, gating = experts.inner, experts.down, experts.gating
    for name, projection in (("experts.inner", inner), ("experts.down", down)):
        check_projection(projection, name, x.device)
    check_instance("experts.gating", gating, Gating)
    if gating.kind not in GATINGS:
        raise ValueError(f"gating.kind: expected one of {', '.join(GATINGS)}, got {gating.kind!r}")
    if gating.kind == CLAMPED_SWIGLU and not gating.gated:
        raise ValueError(f"gating.gated: expected a gate for {CLAMPED_SWIGLU}, got none")
    width = down.in_features * (2 if gating.gated else 1)
    if inner.experts != down.experts or inner.out_features != width or down.out_features != inner.in_features:
        features = inner.out_features // (2 if gating.gated else 1)
        raise ValueError(
            f"experts.down: expected {inner.experts} experts of {features} inputs and {inner.in_features} outputs, "
            f"got {down.experts} of {down.in_features} and {down.out_features}"
        )
    check_matrix(x, "x", inner.in_features)
    check_instance("index", index, Tensor)
    if index.dtype not in INTEGERS:
        raise TypeError(f"index: expected a dtype of {INTEGERS}, got {index.dtype}")
    if index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(f"index: expected shape ({x.shape[0]}, top_k), got {tuple(index.shape)}")
    check_device("index", index.device, x.device)
    check_tensor("weights", weights, x.device, tuple(index.shape))
