"""Random groups of projections, and the three computations that the budget compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.lora import Dtypes, LoraAdapter, LoraProjection, lora_linear_group
from fastpeft_kernels.lora.reference import lora_group_reference
from fastpeft_kernels.weights import DenseWeight
from tests.budget import assert_within_budget


@dataclass
class Derived:
    """Outputs, and the gradients of x and of every parameter that requires one, in order."""

    outputs: tuple[Tensor, ...]
    gradients: list[Tensor | None]


def adapter(
    rank: int, in_features: int, out_features: int, dtype: torch.dtype = torch.float32, **fields: Any
) -> LoraAdapter:
    a = (torch.randn(rank, in_features) / in_features**0.5).to(dtype).requires_grad_()
    b = torch.randn(out_features, rank).to(dtype).requires_grad_()
    if fields.pop("with_bias", False):
        fields["bias"] = torch.randn(out_features).to(dtype).requires_grad_()
    return LoraAdapter(a, b, **fields)


def projection(
    in_features: int,
    out_features: int,
    *ranks: int,
    dtype: torch.dtype = torch.float32,
    lora_dtype: torch.dtype | None = None,
    bias: bool = False,
    magnitude: bool = False,
    **fields: Any,
) -> LoraProjection:
    weight = (torch.randn(out_features, in_features) / in_features**0.5).to(dtype)
    offset = torch.randn(out_features).to(dtype) if bias else None
    adapters = (adapter(rank, in_features, out_features, lora_dtype or dtype, **fields) for rank in ranks)
    gain = (0.5 + torch.rand(out_features)).requires_grad_() if magnitude else None
    return LoraProjection(DenseWeight(weight), offset, tuple(adapters), gain)


def parameters(projections: list[LoraProjection]) -> list[Tensor]:
    return [t for p in projections for t in p.tensors() if t is not None and t.requires_grad]


def seeds_for(projections: list[LoraProjection]) -> list[Tensor | None]:
    return [torch.tensor([i + 1]) if any(a.dropout for a in p.adapters) else None for i, p in enumerate(projections)]


def widened(p: LoraProjection) -> LoraProjection:
    """The projection in fp64, the values the same."""

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    adapters = tuple(LoraAdapter(wide(a.a), wide(a.b), a.scaling, wide(a.bias), a.dropout, a.index) for a in p.adapters)  # type: ignore[arg-type]
    return LoraProjection(DenseWeight(p.weight.decode(dtype=torch.float64)), wide(p.bias), adapters, wide(p.magnitude))


def derive(function: Any, x: Tensor, projections: list[LoraProjection], dys: list[Tensor]) -> Derived:
    outputs = function(x)
    wanted = ([x] if x.requires_grad else []) + parameters(projections)
    given = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if y.requires_grad]
    gradients = torch.autograd.grad([y for y, _ in given], wanted, [dy for _, dy in given], allow_unused=True)
    return Derived(outputs, list(gradients))


def check_group(x: Tensor, projections: list[LoraProjection], dtypes: Dtypes, **options: Any) -> None:
    """Outputs and all gradients of the op within the budget."""
    seeds = seeds_for(projections)
    dys = [torch.randn(*x.shape[:-1], p.weight.shape[0]).to(dtypes.out) for p in projections]
    kept = [dy.clone() for dy in dys], x.detach().clone()
    named = {"compute_dtype": dtypes.compute, "lora_dtype": dtypes.lora, "out_dtype": dtypes.out, "seeds": seeds}
    ours = derive(lambda x: lora_linear_group(x, projections, **named, **options), x, projections, dys)
    index = options.get("adapter_index")
    same = derive(lambda x: lora_group_reference(x, projections, dtypes, seeds, index), x, projections, dys)
    wide = [widened(p) for p in projections]
    x64 = x.detach().double().requires_grad_(x.requires_grad)
    all64 = Dtypes(torch.float64, torch.float64, torch.float64)
    exact = derive(lambda x: lora_group_reference(x, wide, all64, seeds, index), x64, wide, [dy.double() for dy in dys])
    for i, triple in enumerate(zip(ours.outputs, same.outputs, exact.outputs, strict=True)):
        assert_within_budget(*triple, name=f"output {i}")
    for i, (mine, theirs, truth) in enumerate(zip(ours.gradients, same.gradients, exact.gradients, strict=True)):
        assert (mine is None) == (theirs is None) == (truth is None), i
        if mine is not None:
            assert_within_budget(mine, theirs, truth, name=f"gradient {i}")
    assert all(torch.equal(a, b) for a, b in zip(kept[0], dys, strict=True)), "an incoming gradient was written into"
    assert torch.equal(kept[1], x.detach()), "x was written into"
