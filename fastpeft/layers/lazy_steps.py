"""Operations on logits that a loss from hidden states can follow: what they make of the rows, and of a row's values.

A step is tried on a tensor without memory first, which tells shape, strides and dtype, and raises what torch raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

aten: Any = torch.ops.aten


class Added(NamedTuple):
    """A bias of `words` elements: the tensor that gets the gradient, its values when it was added, its version then."""

    tensor: Tensor
    values: Tensor
    version: int | None

    @property
    def unchanged(self) -> bool:
        return self.version is None or self.tensor._version == self.version


@dataclass(frozen=True)
class Trail:
    """What has become of the logits x = h W^T + bias of a head: after * tanh(scale * (x + biases)), or without tanh.

    Attributes:
        like: (..., words), without memory: shape, strides and dtype.
        rows: what makes of the hidden states those of the rows that are left, in order.
        scale: factor of the logits.
        after: factor of the tanh; None without one.
        tanh: whether the tanh was taken; `after` is its factor.
        biases: what was added, in order.
    """

    like: Tensor
    rows: tuple[Callable[[Tensor], Tensor], ...] = ()
    scale: float = 1.0
    tanh: bool = False
    after: float = 1.0
    biases: tuple[Added, ...] = field(default=())

    @property
    def serves(self) -> bool:
        """Whether it can be said with a scale and a soft-cap."""
        return not self.tanh or self.after > 0

    @property
    def softcap(self) -> float | None:
        return self.after if self.tanh else None

    @property
    def head_scale(self) -> float:
        """softcap * tanh(head_scale * x / softcap)."""
        if not self.tanh:
            return self.scale
        whole = self.scale * self.after
        return 1.0 if abs(whole - 1.0) < 1e-12 else whole

    def rows_of(self, tokens: Tensor) -> Tensor:
        """Of (..., size) beside the head's own logits those (..., size) that are beside these."""
        for step in self.rows:
            tokens = step(tokens)
        return tokens


Step = Callable[[Trail, Any, tuple[Any, ...], dict[str, Any]], Trail | None]


def _alike(trail: Trail, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trail | None:
    return replace(trail, like=func(trail.like, *args, **kwargs))


def _cast(trail: Trail, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trail | None:
    """To another floating dtype, and nothing else."""
    rest = {name for name, value in kwargs.items() if value not in (None, False) and name != "dtype"}
    dtype = kwargs.get("dtype") or trail.like.dtype
    if rest - {"memory_format"} or not dtype.is_floating_point:
        return None
    return _alike(trail, func, args, kwargs)


def _view(trail: Trail, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trail | None:
    like = func(trail.like, *args, **kwargs)
    if like.shape[-1:] != trail.like.shape[-1:]:
        return None
    shape = tuple(like.shape[:-1])
    return replace(trail, like=like, rows=(*trail.rows, lambda tokens: tokens.reshape(*shape, tokens.shape[-1])))


def _rows(trail: Trail, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trail | None:
    """Operations whose first argument is a dimension, here any but that of words."""
    like = func(trail.like, *args, **kwargs)
    dim = args[0] if args else kwargs.get("dim", 0)
    last = trail.like.dim() - 1
    if dim % (last + 1) == last:
        unchanged = like.shape == trail.like.shape and like.stride() == trail.like.stride()
        return replace(trail, like=like) if unchanged and func is aten.slice.Tensor else None
    return replace(trail, like=like, rows=(*trail.rows, lambda tokens: func(tokens, *args, **kwargs)))


def _times(trail: Trail, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trail | None:
    factor = args[0]
    if kwargs or type(factor) not in (int, float) or len(args) > 1:
        return None
    if func is aten.div.Tensor:
        if factor == 0:
            return None
        factor = 1 / factor
    trail = replace(trail, like=func(trail.like, *args))
    return replace(trail, after=trail.after * factor) if trail.tanh else replace(trail, scale=trail.scale * factor)


def _tanh(trail: Trail, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trail | None:
    return None if trail.tanh else replace(trail, like=func(trail.like), tanh=True)


def _plus(trail: Trail, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trail | None:
    """One row for all tokens, added to logits as the head gave them. The values are kept as they are now; of a
    tensor that is trained no view is taken, which would have no graph below autograd."""
    bias = args[0]
    words = trail.like.shape[-1]
    if kwargs or type(bias) not in (Tensor, Parameter):
        return None
    if bias.numel() != words or bias.shape[-1:] != (words,):
        return None
    if trail.tanh or trail.scale != 1.0 or not bias.is_floating_point() or bias.dim() > trail.like.dim():
        return None
    like = func(trail.like, torch.empty(bias.shape, dtype=bias.dtype, device="meta"))
    values = bias.detach().clone()
    added = Added(bias, values, bias._version) if bias.requires_grad else Added(values, values, None)
    return replace(trail, like=like, biases=(*trail.biases, added))


STEPS: dict[Any, Step] = {
    aten._to_copy.default: _cast,
    aten.clone.default: _alike,
    aten.detach.default: _alike,
    aten.alias.default: _alike,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.slice.Tensor: _rows,
    aten.select.int: _rows,
    aten.mul.Tensor: _times,
    aten.div.Tensor: _times,
    aten.tanh.default: _tanh,
    aten.add.Tensor: _plus,
}
