"""Operations on tensors without values, of which what comes out is known from an earlier call with the same shapes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

_PLAIN = {int, float, bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None)}


class _Like(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class Repeated:
    """Calls operations, or makes what they made before: layers are alike, and much of the time goes into PyTorch's
    own deduction of shapes, in Python. What returns a part of an argument is always called."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[str, dict[Hashable, Any]]] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        kind, found = self._known.get(func) or self._known.setdefault(func, (_kind(func), {}))
        key = None if kind == "part" else _key(args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        known = found.get(key)
        if known is None:
            result = func(*args, **kwargs)
            if kind == "fresh":
                found[key] = _noted(result, args, kwargs) or ()
            else:  # unless it changed the shape of what it writes
                found[key] = _written(result, args, kwargs) if _key(args, kwargs) == key else ()
            return result
        if type(known) is _Like:
            return known.make()
        if known == ():
            return func(*args, **kwargs)
        if isinstance(known, (int, str)):
            return args[known] if isinstance(known, int) else kwargs[known]
        return tuple(each and each.make() for each in known)


def _kind(func: Any) -> str:
    """What it returns: "fresh" memory, one argument that it has "written", or "part" of one."""
    schema, aliases = func._schema, [each.alias_info for each in func._schema.returns]
    if len(aliases) == 1 and aliases[0] is not None and aliases[0].is_write:
        return "written" if sum(each.is_write for each in schema.arguments) == 1 else "part"
    return "part" if schema.is_mutable or any(each is not None for each in aliases) else "fresh"


def _key(args: Any, kwargs: Any) -> Hashable | None:
    found: list[Any] = []
    return tuple(found) if _add(found, args) and (not kwargs or _add(found, kwargs.items())) else None


def _written(result: Any, args: Any, kwargs: Any) -> int | str | tuple[()]:
    """The place, or the name, of the argument that was returned."""
    places: list[int | str] = [place for place, each in enumerate(args) if each is result]
    return ([*places, *(name for name, each in kwargs.items() if each is result)] or [()])[0]  # type: ignore[return-value]


def _add(key: list[Any], values: Any) -> bool:
    """Whether all of them can be told apart by what is added to the key."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if not value.is_meta:
                return False
            key += (value.shape, value.stride(), value.dtype)
        elif kind in _PLAIN:
            key += (kind, value)
        elif isinstance(value, (tuple, list)):
            key.append(len(value))
            if not _add(key, value):
                return False
        else:
            return False
    return True


def _noted(result: Any, args: Any, kwargs: Any) -> _Like | tuple[_Like | None, ...] | None:
    """How to make the same again; None for anything but tensors with memory of their own."""
    parts = result if type(result) is tuple else (result,)
    given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
    own: list[_Like | None] = []
    for part in parts:
        if part is None:
            own.append(None)
            continue
        if type(part) is not Tensor or not part.is_meta or part.untyped_storage()._cdata in given:
            return None
        like = _Like(part.shape, part.stride(), part.dtype)
        if part.storage_offset() or part.untyped_storage().nbytes() != like.make().untyped_storage().nbytes():
            return None
        given.add(part.untyped_storage()._cdata)
        own.append(like)
    return tuple(own) if type(result) is tuple else own[0]
