"""FrozenWeight: what every op knows of a base weight that is not trained.

An op never asks how the weight is stored. It asks for the values (`decode`), or for a product where the storage has
one of its own (`linear`, `linear_t`), and it remembers a `stamp` to learn in backward whether the base changed since
forward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..common.validation import check_rows

Rows = tuple[int, int]
Stamp = tuple[tuple[int, ...], ...]


class FrozenWeight(ABC):
    """A frozen matrix of `shape` (out_features, in_features), wherever and however its values are stored.

    Attributes:
        kind: name under which `unflatten_weight` finds the class; unique, stable across processes.
        shape: (out_features, in_features).
        dtype: floating dtype of the values as stored or as originally quantised; `decode` can give another.
        device: where the storage is, and where decoded values appear.
        fills: `decode(out=...)` writes straight into `out`; where False, `decode()` into new memory costs less.
        row_by_row: what `linear` and `linear_t` make of a row depends on no other row.
    """

    kind: ClassVar[str]
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    fills: bool = True
    row_by_row: bool = True

    _kinds: ClassVar[dict[str, type[FrozenWeight]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            other = FrozenWeight._kinds.setdefault(cls.kind, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise TypeError(f"FrozenWeight kind {cls.kind!r} is taken by {other.__qualname__}")

    @property
    def storage(self) -> str:
        """What decides how much a product over the weight costs, beside its shape; for keys of measured choices."""
        return self.kind

    @abstractmethod
    def decode(self, out: Tensor | None = None, rows: Rows | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The values as a dense matrix.

        Args:
            out: (rows, in_features) tensor on `device` to fill, any floating dtype and strides; its dtype wins.
            rows: half-open range (first, last) of output features; all of them when None.
            dtype: dtype of the result when `out` is None; the weight's own by default.

        Returns:
            `out`, or a tensor that the caller must not write into (a dense weight returns a view of itself).

        Raises:
            ValueError: `rows` outside the weight, or `out` of another shape or device.
        """

    @abstractmethod
    def flatten(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """(tensors, meta): meta holds JSON values only, so that both can pass through a custom op or a file."""

    @classmethod
    @abstractmethod
    def unflatten(cls, tensors: tuple[Tensor, ...], meta: dict[str, Any]) -> FrozenWeight:
        """The weight again; shares storage with `tensors`."""

    def ready(self, dtype: torch.dtype) -> Tensor | None:
        """The values as they are stored, not to be written into, when that is a dense matrix of `dtype`; else None."""
        return None

    def is_ready(self, dtype: torch.dtype) -> bool:
        """Whether `ready` gives the values, told without touching them."""
        return False

    @property
    def selects(self) -> bool:
        """Whether `select` can read some rows without decoding the others."""
        return self.ready(self.dtype) is not None

    def select(self, index: Tensor, out: Tensor | None = None) -> Tensor:
        """The rows `index` (count,) int64 in the weight's own dtype, only where it `selects`.

        Args:
            out: (count, in_features) in that dtype, to fill; else new memory.
        """
        values = self.ready(self.dtype)
        assert values is not None
        return torch.index_select(values, 0, index, out=out)

    def linear(self, x: Tensor, shared: dict[str, Any] | None = None) -> Tensor | None:
        """x @ W.T for x of shape (tokens, in_features) when the storage has a faster product of its own here.

        Args:
            shared: what weights that are multiplied by the very same x have made of it, by `kind`; to read and add to.
        """
        return None

    def linear_t(self, dy: Tensor) -> Tensor | None:
        """dy @ W for dy of shape (tokens, out_features), likewise."""
        return None

    def prefetch(self) -> None:
        """Start to bring the storage to `device`; returns at once. Nothing to do for resident weights."""

    def release(self) -> None:
        """The op is done with the storage until the next `prefetch`. Nothing to do for resident weights."""

    def stamp(self) -> Stamp:
        """Identity of the stored values: (storage, offset, version) of every tensor.

        Differs after any write that torch tracks and after a move to other memory, but not when a sharding library
        frees the storage after forward and fills the same one again for backward.
        """
        return stamp_of(self.flatten()[0])

    def check_unchanged(self, stamp: Stamp) -> None:
        """Raise RuntimeError unless the storage is still what it was when `stamp` was taken."""
        if self.stamp() != stamp:
            raise RuntimeError(
                f"the frozen base weight {self.shape} was changed or moved between forward and backward; "
                "merge, unmerge, quantise or move the model only after backward"
            )

    def _check_decode(self, out: Tensor | None, rows: Rows | None) -> tuple[int, int]:
        first, last = check_rows(rows, self.shape[0])
        if out is not None:
            if tuple(out.shape) != (last - first, self.shape[1]):
                raise ValueError(f"out: expected shape {(last - first, self.shape[1])}, got {tuple(out.shape)}")
            if out.device != self.device:
                raise ValueError(f"out: expected a tensor on {self.device}, got {out.device}")
        return first, last


def stamp_of(tensors: Sequence[Tensor]) -> Stamp:
    """`FrozenWeight.stamp` of a weight that is stored in these."""
    return tuple(
        [(t.untyped_storage()._cdata, int(t.storage_offset()), 0 if t.is_inference() else t._version) for t in tensors]
    )


class Weighted(Protocol):
    """A projection of any kind."""

    @property
    def weight(self) -> FrozenWeight: ...


def unflatten_weight(kind: str, tensors: tuple[Tensor, ...], meta: dict[str, Any]) -> FrozenWeight:
    """The FrozenWeight of class `kind` over `tensors`. Raises ValueError for an unknown kind."""
    if kind not in FrozenWeight._kinds:
        raise ValueError(f"kind: expected one of {sorted(FrozenWeight._kinds)}, got {kind!r}")
    return FrozenWeight._kinds[kind].unflatten(tensors, meta)
