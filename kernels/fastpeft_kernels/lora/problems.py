"""The choices of a group of projections as problems to be timed: products of rank width, tiles, and whole groups."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..common.random import draw_seed
from ..quant import encode_4bit
from ..tuning.choosing import forced
from ..tuning.measuring import Tunable
from ..weights import DenseWeight, FourBitWeight, FrozenWeight
from . import library
from .api import run_group
from .configs import linear_tiles
from .keys import (
    GROUP,
    LINEAR,
    RANK,
    GroupKey,
    LinearKey,
    RankKey,
    linear_candidates,
    linear_cases,
    paths,
    rank_backends,
)
from .projection import Dtypes, Group, LoraAdapter, LoraProjection
from .rank_products import both_gradients, down_gradient, project_down
from .reference import lora_group_reference

_DROPOUT = 0.05
_RANK = 16  # of a product alone


class _Group:
    """A group of the key's sizes on random numbers, scaled to variances of about one. Adapters are fp32, as PEFT's."""

    def __init__(self, key: GroupKey, device: torch.device) -> None:
        self.key, self.device = key, device
        self.dtypes = Dtypes(*(getattr(torch, name) for name in (key.compute, key.lora, key.out)))
        self.projections = [
            self._projection(*sizes) for sizes in zip(key.out_features, key.ranks, key.bases, strict=True)
        ]
        self.seeds = [draw_seed(device) if key.dropout and p.rank else None for p in self.projections]
        self.group = Group(self.projections, self.dtypes, self.seeds)
        self.x = self._randn(key.tokens, key.in_features, dtype=self.dtypes.compute)
        self.dys = [self._randn(key.tokens, n, dtype=self.dtypes.out) for n in key.out_features]

    def exact(self) -> tuple[list[Tensor], list[Tensor]]:
        """(outputs, gradients of x and of every a and b) in fp64."""
        wide = [_widened(projection) for projection in self.projections]
        x = self.x.double().requires_grad_()
        outputs = lora_group_reference(x, wide, Dtypes(*[torch.float64] * 3), self.seeds)
        gradients = torch.autograd.grad(outputs, [x, *trained(wide)], [dy.double() for dy in self.dys])
        return [y.detach() for y in outputs], list(gradients)

    def _projection(self, out_features: int, rank: int, base: str) -> LoraProjection:
        features = self.key.in_features
        values = self._randn(out_features, features) / features**0.5
        weight: FrozenWeight
        if base == "four_bit":
            weight = FourBitWeight(encode_4bit(values.to(self.dtypes.compute), nested=True))
        elif isinstance(dtype := getattr(torch, base, None), torch.dtype):
            weight = DenseWeight(values.to(dtype))
        else:
            raise ValueError(f"bases: expected 'four_bit' or a dtype, got {base!r}")
        if rank == 0:
            return LoraProjection(weight)
        a, b = self._randn(rank, features) / features**0.5, self._randn(out_features, rank) / rank**0.5
        dropout = _DROPOUT if self.key.dropout else 0.0
        return LoraProjection(weight, None, (LoraAdapter(a.requires_grad_(), b.requires_grad_(), 2.0, None, dropout),))

    def _randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)


class _Linear:
    """One large product with its update, by a tile or by the library."""

    def __init__(self, key: LinearKey, device: torch.device) -> None:
        def rand(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(getattr(torch, key.dtype))

        def laid_out(t: Tensor) -> Tensor:
            return t.t().contiguous().t() if key.transposed else t

        w, b = rand(key.out_features, key.in_features) / key.in_features**0.5, rand(key.out_features, _RANK)
        x, s = rand(key.tokens, key.in_features), rand(key.tokens, _RANK)
        self.operands = (x, laid_out(w), s, laid_out(b))
        self.out = torch.empty((key.tokens, key.out_features), dtype=x.dtype, device=device)
        self.tiles = linear_tiles(device)

    def run(self, candidate: str) -> Sequence[Tensor]:
        from .forward import lora_linear
        from .linear import library_linear

        with torch.no_grad():
            if candidate == "torch":
                return [library_linear(*self.operands, out=self.out)]
            return [lora_linear(*self.operands, out=self.out, config=self.tiles[candidate])]

    def exact(self) -> Sequence[Tensor]:
        x, w, s, b = (t.double() for t in self.operands)
        return [x @ w.t() + s @ b.t()]


class _Both(_Group):
    """`run_group`, forward and backward; the products of rank width, and the tiles, are then those measured before."""

    def run(self, candidate: str) -> Sequence[Tensor]:
        implementation: ModuleType = library
        if candidate == "triton":
            from . import triton_path

            if reason := triton_path.refusal(self.x, self.group):
                raise ValueError(reason)
            implementation = triton_path
        x = self.x.detach().requires_grad_()
        outputs = run_group(x, self.projections, self.dtypes, self.seeds, implementation)
        return [*outputs, *torch.autograd.grad(outputs, [x, *trained(self.projections)], self.dys)]

    def exact(self) -> list[Tensor]:  # type: ignore[override]
        outputs, gradients = super().exact()
        return [*outputs, *gradients]


class _RankProducts:
    """S = X A^T, dA = dS^T X, dS = dY B and dB = dY^T S of one projection as wide as it is high."""

    def __init__(self, key: RankKey, device: torch.device) -> None:
        self.dtype = getattr(torch, key.dtype)
        shapes = ((key.tokens, key.features), (key.features, key.rank), (key.tokens, key.rank))
        self.y, factor, self.s = (torch.randn(shape, device=device).to(self.dtype) for shape in shapes)
        self.factor = factor / key.features**0.5
        self.out = torch.empty_like(self.s)

    def run(self, candidate: str) -> Sequence[Tensor]:
        with torch.no_grad(), forced({RANK: candidate}):
            db = both_gradients(self.y, self.factor, self.s, self.out, torch.float32)
            return [project_down(self.y, self.factor), self.out, db, down_gradient(self.s, self.y, torch.float32)]

    def exact(self) -> Sequence[Tensor]:
        y, factor, s = (t.double() for t in (self.y, self.factor, self.s))
        return [y @ factor, y @ factor, y.t() @ s, s.t() @ y]


def trained(projections: Sequence[LoraProjection]) -> list[Tensor]:
    """a and b of every adapter."""
    adapters = [adapter for projection in projections for adapter in projection.adapters]
    return [tensor for adapter in adapters for tensor in (adapter.a, adapter.b)]


def _widened(projection: LoraProjection) -> LoraProjection:
    def wide(parameter: Tensor) -> Tensor:
        return parameter.detach().double().requires_grad_()

    adapters = tuple(LoraAdapter(wide(a.a), wide(a.b), a.scaling, None, a.dropout) for a in projection.adapters)
    return LoraProjection(DenseWeight(projection.weight.decode(dtype=torch.float64)), None, adapters)


TUNABLES = (
    Tunable(RANK, RankKey, rank_backends, _RankProducts),
    Tunable(LINEAR, LinearKey, linear_candidates, _Linear),
    Tunable(GROUP, GroupKey, paths, _Both, within=linear_cases),
)
"""In the order in which they must be measured."""
