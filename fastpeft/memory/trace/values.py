"""Small tensors with values among those without: tokens and the sizes of pictures, which models' own code looks into.

Where both meet in one operation the values go; what such an operation makes has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_ATEN = torch.ops.aten
_INDEXING = (_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default)


def has_values(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and not tensor.is_meta


def moved_nowhere(func: Any, args: Any, kwargs: Any) -> Any:
    """Keyword arguments for a copy between values and none with which it stays where it is; None for all else."""
    if func is not _ATEN._to_copy.default or "device" not in kwargs or kwargs["device"] is None:
        return None
    here, there = args[0].is_meta, torch.device(kwargs["device"]).type == "meta"
    return None if here == there else kwargs | {"device": args[0].device}


def met(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments of an operation, without values where some have none.

    A mask that picks elements picks as many as its values say, or all where it has none.
    """
    if func in _INDEXING and args[0].is_meta:
        args = (args[0], [place for each in args[1] for place in _places(each)], *args[2:])
    if _kinds(args) | _kinds(kwargs.values()) != _BOTH:
        return args, kwargs
    moved: tuple[Any, Any] = tree_map(_without, (args, kwargs))
    return moved


_VALUES, _NONE, _BOTH = 1, 2, 3


def _kinds(given: Iterable[Any]) -> int:
    """Whether there are tensors with values, without, or both."""
    found = 0
    for each in given:
        if isinstance(each, Tensor):
            found |= _NONE if each.is_meta else _VALUES
        elif isinstance(each, (list, tuple)):
            found |= _kinds(each)
    return found


def _without(value: Any) -> Any:
    if not has_values(value) or value.dim() == 0:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _places(index: Tensor | None) -> list[Tensor | None]:
    """What a mask stands for in an index, a tensor for each of its dimensions."""
    if index is None or index.dtype != torch.bool:
        return [index]
    if index.is_meta:
        return [torch.empty(index.numel(), dtype=torch.int64, device="meta")] * index.dim()
    return list(index.nonzero().unbind(1))
