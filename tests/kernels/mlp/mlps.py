"""Random MLPs, and the three computations that the budget compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.lora import Dtypes, LoraProjection
from fastpeft_kernels.mlp import Mlp, lora_mlp
from fastpeft_kernels.mlp.reference import lora_mlp_reference
from tests.budget import assert_within_budget
from tests.kernels.lora.groups import derive, projection, seeds_for, widened

LAYOUTS = ("gate and up", "both in one", "up alone")


def mlp(
    layout: str,
    in_features: int,
    features: int,
    *,
    activation: str = "silu",
    ranks: tuple[tuple[int, ...], ...] = ((4,), (3,), (5,)),
    between: float = 0.0,
    **fields: Any,
) -> Mlp:
    """`ranks` of gate, up and down; of "both in one" and "up alone" those of the gate are taken for the one.

    `between` is the MLP's dropout.
    """
    sizes = {"gate and up": (features, features), "both in one": (2 * features,), "up alone": (features,)}[layout]
    inner = [projection(in_features, size, *r, **fields) for size, r in zip(sizes, ranks, strict=False)]
    return Mlp(tuple(inner), projection(features, in_features, *ranks[-1], **fields), activation, dropout=between)


def mixed(m: Mlp, adapter_index: tuple[int, ...]) -> Mlp:
    """For rows with adapters of their own, which have numbers from 0 on, in the down projection from 1."""

    def numbered(p: LoraProjection, first: int) -> LoraProjection:
        return replace(p, adapters=tuple(replace(a, index=i + first) for i, a in enumerate(p.adapters)))

    inner = tuple(numbered(p, 0) for p in m.inner)
    return replace(m, inner=inner, down=numbered(m.down, 1), adapter_index=adapter_index)


def tiled_by(tile: int) -> Callable[..., Tensor]:
    """`lora_mlp` over tiles, for the checks that are shared with the whole."""

    def tiled(*args: Any, **named: Any) -> Tensor:
        return lora_mlp(*args, **{**named, "keep": "input", "tile": tile})

    return tiled


def wide(m: Mlp) -> Mlp:
    return replace(m, inner=tuple(widened(p) for p in m.inner), down=widened(m.down))


def seeds_of(m: Mlp) -> list[Tensor | None]:
    return [*seeds_for(list(m.projections)), *[torch.tensor([7])] * bool(m.dropout)]


def check_mlp(x: Tensor, m: Mlp, dtypes: Dtypes, **options: Any) -> None:
    """The output and all gradients of the op within the budget; nothing given is written into."""
    seeds = seeds_of(m)
    dy = torch.randn(*x.shape[:-1], m.down.weight.shape[0]).to(dtypes.out)
    before = dy.clone(), x.detach().clone()
    named = {"compute_dtype": dtypes.compute, "lora_dtype": dtypes.lora, "out_dtype": dtypes.out, "seeds": seeds}
    every = list(m.projections)
    ours = derive(lambda x: (lora_mlp(x, m, **named, **options),), x, every, [dy])
    same = derive(lambda x: (lora_mlp_reference(x, m, dtypes, seeds),), x, every, [dy])
    m64, x64 = wide(m), x.detach().double().requires_grad_(x.requires_grad)
    all64 = Dtypes(torch.float64, torch.float64, torch.float64)
    exact = derive(lambda x: (lora_mlp_reference(x, m64, all64, seeds),), x64, list(m64.projections), [dy.double()])
    assert_within_budget(ours.outputs[0], same.outputs[0], exact.outputs[0])
    for i, (mine, theirs, truth) in enumerate(zip(ours.gradients, same.gradients, exact.gradients, strict=True)):
        assert (mine is None) == (theirs is None) == (truth is None), i
        if mine is not None:
            assert_within_budget(mine, theirs, truth, name=f"gradient {i}")
    assert torch.equal(before[0], dy), "an incoming gradient was written into"
    assert torch.equal(before[1], x.detach()), "x was written into"
