"""The choices of a group of projections as problems to be timed: its products of rank width, and the large ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tuning.measuring import Tunable
from ..weights import DenseWeight
from .configs import linear_tiles
from .keys import LINEAR, MIXED, RANK, LinearKey, MixedKey, RankKey, linear_candidates, rank_backends
from .mixed_products import MixedProducts
from .projection import Dtypes, Group, LoraProjection
from .rank_products import both_gradients, down_gradient, project_down

_RANK = 16  # of a product alone


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


class _RankProducts:
    """S = X A^T, dA = dS^T X, dS = dY B and dB = dY^T S of one projection as wide as it is high."""

    def __init__(self, key: RankKey, device: torch.device) -> None:
        self.dtype = getattr(torch, key.dtype)
        shapes = ((key.tokens, key.features), (key.features, key.rank), (key.tokens, key.rank))
        self.y, factor, self.s = (torch.randn(shape, device=device).to(self.dtype) for shape in shapes)
        self.factor = factor / key.features**0.5
        self.out = torch.empty_like(self.s)

    def run(self, candidate: str) -> Sequence[Tensor]:
        with torch.no_grad():
            s = project_down(self.y, self.factor, backend=candidate)
            db = both_gradients(self.y, self.factor, self.s, self.out, torch.float32, backend=candidate)
            return [s, self.out, db, down_gradient(self.s, self.y, torch.float32, backend=candidate)]

    def exact(self) -> Sequence[Tensor]:
        y, factor, s = (t.double() for t in (self.y, self.factor, self.s))
        return [y @ factor, y @ factor, y.t() @ s, s.t() @ y]


class _MixedProducts:
    """S = X A^T, Y = S B^T, dS = dY B, dB = dY^T S and dA = dS^T X, with an adapter a row."""

    def __init__(self, key: MixedKey, device: torch.device) -> None:
        dtype = getattr(torch, key.dtype)
        shapes = ((key.tokens, key.features), (key.rows, key.features, key.rank), (key.tokens, key.rank))
        self.y, factor, self.s = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
        self.factor = factor / key.features**0.5
        self.out, self.wide, self.tokens = torch.empty_like(self.s), torch.empty_like(self.y), key.tokens
        self.projections = [LoraProjection(DenseWeight(self.y[:1]))]
        self.dtypes, self.index = Dtypes(dtype, dtype, dtype), tuple(range(key.rows))

    def run(self, candidate: str) -> Sequence[Tensor]:
        group = Group(self.projections, self.dtypes, [None], candidate, self.index)
        products = MixedProducts(group, self.tokens)
        with torch.no_grad():
            s = products.project_down(self.y, self.factor.mT)
            products.update(self.s, self.factor.mT, self.wide)
            db = products.both_gradients(self.y, self.factor, self.s, self.out, torch.float32)
            return [s, self.wide, self.out, db, products.down_gradient(self.s, self.y, torch.float32)]

    def exact(self) -> Sequence[Tensor]:
        rows = len(self.index)
        y, s = (t.double().view(rows, self.tokens // rows, t.shape[1]) for t in (self.y, self.s))
        factor = self.factor.double()
        found = y @ factor, s @ factor.mT, y @ factor
        return [*(t.flatten(0, 1) for t in found), y.mT @ s, s.mT @ y]


TUNABLES = (
    Tunable(RANK, RankKey, rank_backends, _RankProducts),
    Tunable(MIXED, MixedKey, rank_backends, _MixedProducts),
    Tunable(LINEAR, LinearKey, linear_candidates, _Linear),
)
