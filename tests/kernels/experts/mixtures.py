"""Random mixtures of experts, and the three computations that the budget compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.experts import ExpertAdapter, ExpertProjection, Experts, Gating, lora_experts
from fastpeft_kernels.experts.reference import lora_experts_reference
from fastpeft_kernels.weights import DenseWeight
from tests.budget import assert_within_budget

SILU = Gating("silu")


def projection(
    experts: int,
    in_features: int,
    out_features: int,
    *ranks: int,
    dtype: torch.dtype = torch.float32,
    lora_dtype: torch.dtype | None = None,
    transposed: bool = False,
    bias: bool = False,
) -> ExpertProjection:
    """B in PEFT's order, the experts of a rank beside each other."""
    shape = (experts * in_features, out_features) if transposed else (experts * out_features, in_features)
    weight = DenseWeight((torch.randn(shape) / in_features**0.5).to(dtype))
    adapters = []
    for rank in ranks:
        a = (torch.randn(experts, rank, in_features) / in_features**0.5).to(lora_dtype or dtype).requires_grad_()
        b = torch.randn(out_features, rank, experts).to(lora_dtype or dtype).permute(2, 0, 1).requires_grad_()
        adapters.append(ExpertAdapter(a, b, 0.5))
    offset = torch.randn(experts, out_features).to(dtype) if bias else None
    return ExpertProjection(weight, experts, transposed, offset, tuple(adapters))


def mixture(
    experts: int = 4,
    in_features: int = 24,
    features: int = 16,
    gating: Gating = SILU,
    ranks: Sequence[Sequence[int]] = ((8,), (8,)),
    **fields: Any,
) -> Experts:
    width = features * (2 if gating.gated else 1)
    inner = projection(experts, in_features, width, *ranks[0], **fields)
    return Experts(inner, projection(experts, features, in_features, *ranks[1], **fields), gating)


def routing(tokens: int, top_k: int, experts: int, weight_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(index, weights) as a router gives them: differing experts for each token."""
    index = torch.rand(tokens, experts).topk(top_k).indices
    weights = torch.rand(tokens, top_k).softmax(-1).to(weight_dtype)
    return index, weights.requires_grad_()


def parameters(projections: Sequence[ExpertProjection]) -> list[Tensor]:
    return [t for p in projections for t in p.tensors() if t.requires_grad]


def widened(p: ExpertProjection) -> ExpertProjection:
    """The projection in fp64, the values the same."""

    def wide(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad)

    adapters = tuple(ExpertAdapter(wide(a.a), wide(a.b), a.scaling) for a in p.adapters)
    bias = None if p.bias is None else p.bias.double()
    return ExpertProjection(DenseWeight(p.weight.decode().double()), p.experts, p.transposed, bias, adapters)


def derive(function: Callable[[], Tensor], wanted: Sequence[Tensor], dy: Tensor) -> list[Tensor | None]:
    """[output, gradient of each of `wanted`]."""
    y = function()
    found = torch.autograd.grad(y, [t for t in wanted if t.requires_grad], dy.to(y.dtype), allow_unused=True)
    return [y.detach(), *found]


def check_experts(
    x: Tensor, index: Tensor, weights: Tensor, m: Experts, dtype: torch.dtype | None = None, **options: Any
) -> None:
    """The output and all gradients of the op within the budget; nothing given is written into."""
    dtype = dtype or x.dtype
    dy = torch.randn(x.shape).to(x.dtype)
    before = [t.detach().clone() for t in (x, weights, dy, index)]
    every = [x, weights, *parameters(m.projections)]
    ours = derive(lambda: lora_experts(x, index, weights, m, dtype=dtype, **options), every, dy)
    same = derive(lambda: lora_experts_reference(x, index, weights, m, dtype), every, dy)
    m64 = Experts(widened(m.inner), widened(m.down), m.gating)
    x64, weights64 = (t.detach().double().requires_grad_(t.requires_grad) for t in (x, weights))
    every64 = [x64, weights64, *parameters(m64.projections)]
    exact = derive(lambda: lora_experts_reference(x64, index, weights64, m64, torch.float64), every64, dy)
    for i, (mine, theirs, truth) in enumerate(zip(ours, same, exact, strict=True)):
        assert (mine is None) == (theirs is None) == (truth is None), i
        if mine is not None:
            assert_within_budget(mine, theirs, truth, name=f"gradient {i}" if i else "output")
    for given, kept in zip((x, weights, dy, index), before, strict=True):
        assert torch.equal(given, kept), "an input was written into"
