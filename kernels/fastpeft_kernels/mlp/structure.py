"""What the op works on: the projections of an MLP, and what stands between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..activation import KINDS
from ..common.bounded import recall
from ..common.random import dropout, keep_threshold
from ..common.validation import check_instance
from ..lora import LoraProjection
from ..lora.mixed import check_adapter_index
from ..lora.projection import Dtypes, Group, check_group


@dataclass(frozen=True, eq=False, slots=True)
class Mlp:
    """down(drop(activation(gate(x)) * up(x))), or down(drop(activation(up(x)))) where there is no gate.

    Attributes:
        inner: the projections of x: (gate, up); one that gives both, the gate in its first half; or (up,).
        down: the projection back, of `features` inputs.
        activation: one of `activation.KINDS`.
        one_a: as `lora.projection.Group.one_a`, of the inner projections.
        adapter_index: as `lora.projection.Group.adapter_index`, of every projection.
        dropout: probability with which an element of what the down projection reads is dropped, in [0, 1).
    """

    inner: tuple[LoraProjection, ...]
    down: LoraProjection
    activation: str
    one_a: bool = False
    adapter_index: tuple[int, ...] | None = None
    dropout: float = 0.0
    _groups: dict[Any, tuple[Group, Group]] = field(default_factory=dict, init=False, repr=False)

    @property
    def features(self) -> int:
        """Size of what the activation gives."""
        return self.down.weight.shape[1]

    @property
    def width(self) -> int:
        """Size of all that `inner` gives: once or twice `features`."""
        return sum([projection.weight.shape[0] for projection in self.inner])

    @property
    def projections(self) -> tuple[LoraProjection, ...]:
        return (*self.inner, self.down)

    def groups(self, dtypes: Dtypes, seeds: Sequence[Tensor | None]) -> tuple[Group, Group]:
        """The projections of x, and the one back, kept where no adapter's input loses elements.

        Args:
            seeds: as `lora_mlp` takes them.
        """
        drops = any([seed is not None for seed in seeds[: len(self.inner) + 1]])
        if drops or torch.compiler.is_compiling():
            return self._make_groups(dtypes, seeds)
        return recall(self._groups, dtypes, lambda: self._make_groups(dtypes, seeds))

    def _make_groups(self, dtypes: Dtypes, seeds: Sequence[Tensor | None]) -> tuple[Group, Group]:
        count, index = len(self.inner), self.adapter_index
        inner = Group(self.inner, dtypes, seeds[:count], adapter_index=index, one_a=self.one_a)
        return inner, Group((self.down,), dtypes, seeds[count : count + 1], adapter_index=index)

    def drop(self, h: Tensor, seeds: Sequence[Tensor | None]) -> Tensor:
        """What the down projection reads, written over h (tokens, features), or its gradient over that of h."""
        return h if (drawn := self.drawn(seeds)) is None else dropout(h, *drawn, out=h)

    def drawn(self, seeds: Sequence[Tensor | None]) -> tuple[Tensor, float] | None:
        """(seed, p) of the dropout between the projections, or None where nothing is dropped."""
        seed = seeds[-1] if self.dropout and len(seeds) > len(self.projections) else None
        return None if seed is None else (seed, self.dropout)

    def columns(self, pre: Tensor) -> list[Tensor]:
        """The part of (tokens, width) that each of `inner` fills."""
        return list(pre.split([projection.weight.shape[0] for projection in self.inner], dim=-1))

    def halves(self, pre: Tensor) -> tuple[Tensor | None, Tensor]:
        """(gate, up), each (tokens, features), of (tokens, width); None for no gate."""
        if self.width == self.features:
            return None, pre
        return pre[:, : self.features], pre[:, self.features :]


def check_mlp(x: Tensor, mlp: Mlp) -> None:
    """Raise TypeError or ValueError, naming the argument, unless the parts fit `x` and each other."""
    check_instance("mlp", mlp, Mlp)
    check_instance("mlp.down", mlp.down, LoraProjection)
    if mlp.activation not in KINDS:
        raise ValueError(f"activation: expected one of {', '.join(KINDS)}, got {mlp.activation!r}")
    keep_threshold(mlp.dropout)
    check_group(x, mlp.inner)
    features, width = mlp.features, mlp.width
    halves = [projection.weight.shape[0] for projection in mlp.inner]
    if len(halves) > 2 or width not in (features, 2 * features) or (len(halves) == 2 and halves[0] != halves[1]):
        raise ValueError(
            f"down: expected as many inputs as gate and up have outputs each, got {features} inputs, outputs {halves}"
        )
    check_group(x.new_empty((0, features)), [mlp.down])
    if any(projection.magnitude is not None for projection in mlp.projections):
        raise ValueError("mlp: expected projections without magnitude (DoRA), got one with it")
    if mlp.adapter_index is not None:
        check_adapter_index(mlp.adapter_index, x, mlp.projections)
