"""Dictionaries of what was found out before, which do not grow without end where every call brings new sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
MOST = 1024
_AT_ONCE = 128
_UNKNOWN: Any = object()


def recall(known: dict[Key, Value], key: Key, find: Callable[[], Value]) -> Value:
    """What `known` has, else what is found now, which it has from then on."""
    value = known.get(key, _UNKNOWN)
    return remember(known, key, find()) if value is _UNKNOWN else value


def remember(known: dict[Key, Value], key: Key, value: Value) -> Value:
    """The value, which `known` has from now on; of a full one the oldest go. Any thread may add to it meanwhile."""
    if len(known) >= MOST:
        for oldest in list(known)[: len(known) - MOST + _AT_ONCE]:
            known.pop(oldest, None)
    known[key] = value
    return value
