"""What the ops work on: stacks of frozen matrices, one an expert, with low-rank updates of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights import FrozenWeight
from .gating import Gating

Matrices = Tensor | Callable[[int], Tensor]
"""(experts, n, m), or what gives the (n, m) of one expert."""


@dataclass(frozen=True, eq=False, slots=True)
class ExpertAdapter:
    """One low-rank update of every expert: scaling * (x @ a[e].T @ b[e].T).

    Attributes:
        a: (experts, rank, in_features), floating, any strides.
        b: (experts, out_features, rank), dtype of `a`, any strides.
        scaling: factor of the update; a float, or a 0-d tensor that stays on its device.
    """

    a: Tensor
    b: Tensor
    scaling: float | Tensor = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclass(frozen=True, eq=False, slots=True)
class ExpertProjection:
    """Frozen linear maps, one an expert, with their active adapters; with none they are plain.

    Attributes:
        weight: FrozenWeight that holds the experts' matrices under each other, (experts * out_features, in_features);
            (experts * in_features, out_features) if `transposed`.
        experts: how many.
        transposed: whether x is multiplied by a stored matrix, and not by its transpose.
        bias: (experts, out_features), frozen, or None.
        adapters: the active adapters, in the order in which they are summed.
    """

    weight: FrozenWeight
    experts: int
    transposed: bool = False
    bias: Tensor | None = None
    adapters: tuple[ExpertAdapter, ...] = ()

    @property
    def rank(self) -> int:
        """Sum of the adapters' ranks."""
        return sum(adapter.rank for adapter in self.adapters)

    @property
    def _stored(self) -> tuple[int, int]:
        return self.weight.shape[0] // max(1, self.experts), self.weight.shape[1]

    @property
    def in_features(self) -> int:
        return self._stored[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        return self._stored[1 if self.transposed else 0]

    def tensors(self) -> tuple[Tensor, ...]:
        """What autograd tracks: a and b of each adapter."""
        return tuple(t for adapter in self.adapters for t in (adapter.a, adapter.b))

    def read_again(self) -> list[Tensor]:
        """What backward reads; to be saved, for torch to notice a write before it."""
        return [t for a in self.adapters for t in (a.a, a.b, a.scaling) if isinstance(t, Tensor)]

    def matrices(self, dtype: torch.dtype) -> Matrices:
        """(experts, out_features, in_features) where the values lie ready; else what decodes those of one expert."""
        rows, columns = self._stored
        ready = self.weight.ready(dtype)
        if ready is not None:
            stack = ready.view(self.experts, rows, columns)
            return stack.mT if self.transposed else stack

        def decode(expert: int) -> Tensor:
            matrix = self.weight.decode(rows=(expert * rows, (expert + 1) * rows), dtype=dtype)
            return matrix.t() if self.transposed else matrix

        return decode


@dataclass(frozen=True, eq=False, slots=True)
class Experts:
    """Of each expert: down(gating(inner(x))).

    Attributes:
        inner: the projection of x to gate and up, or to up alone.
        down: the projection back.
        gating: what stands between them.
    """

    inner: ExpertProjection
    down: ExpertProjection
    gating: Gating

    @property
    def projections(self) -> tuple[ExpertProjection, ExpertProjection]:
        return self.inner, self.down
