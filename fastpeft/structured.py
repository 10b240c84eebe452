"""Dataclasses from plain data, as JSON and YAML give it; errors name the key, what was expected and what came.

Understood as field types: bool, int, float, str, Any, None, Literal, unions, list[T], dict[str, T] and dataclasses.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastpeft.hints import did_you_mean

T = TypeVar("T")


def build(cls: type[T], data: Any, key: str = "") -> T:
    """An instance of the dataclass `cls` from a mapping.

    Args:
        cls: the dataclass; its fields may be dataclasses in turn.
        data: mapping of field names to plain values. Fields with a default may be absent.
        key: dotted name of `data` in its file, for messages.

    Raises:
        ValueError: an unknown key (the message names the nearest right one), a missing one, or a value that is not one
            of a Literal's.
        TypeError: a value of another type than its field's.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"{key or 'top level'}: expected a mapping, got {_described(data)}")
    known: dict[str, Field[Any]] = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            raise ValueError(unknown_key(_join(key, name), [_join(key, other) for other in known]))
    for name, field in known.items():
        if name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{_join(key, name)}: expected a value, got none")
    hints = _hints(cls)  # type: ignore[arg-type]
    return cls(**{name: convert(hints[name], value, _join(key, name)) for name, value in data.items()})


def convert(kind: Any, value: Any, key: str) -> Any:
    """`value` as the type `kind`, or an error as `build` raises it. An int may stand where a float is expected."""
    if kind is Any or type(value) is kind:
        return value
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, key)
    if origin is Literal:
        if value not in arguments or type(value) not in {type(argument) for argument in arguments}:
            raise ValueError(f"{key}: expected {type_name(kind)}, got {value!r}{did_you_mean(value, arguments)}")
        return value
    if origin is list:
        _require(isinstance(value, list), kind, value, key)
        return [convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _require(isinstance(value, Mapping) and all(isinstance(name, str) for name in value), kind, value, key)
        return {name: convert(arguments[1], item, _join(key, name)) for name, item in value.items()}
    if is_dataclass(kind):
        return build(kind, value, key)  # type: ignore[arg-type]
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{key}: expected a number up to 1.8e308, got one of {value.bit_length()} bits") from None
    # bool is a subclass of int, and `r: true` is a mistake.
    _require(isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool), kind, value, key)
    return value


def unknown_key(key: str, known: list[str]) -> str:
    """The message for a key that is not one of `known`."""
    return f"{key}: unknown key{did_you_mean(key, known) or ', expected one of ' + ', '.join(known)}"


def type_name(kind: Any) -> str:
    """A type as a user would say it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if kind is types.NoneType:
        return "null"
    if origin is None:
        return "a mapping" if is_dataclass(kind) else getattr(kind, "__name__", str(kind))
    return str(kind).replace("typing.", "")


_hints = cache(get_type_hints)  # what each of thousands of records would evaluate anew


def _convert_union(kinds: tuple[Any, ...], value: Any, key: str) -> Any:
    first_error: Exception | None = None
    for kind in sorted(kinds, key=lambda kind: kind is not type(value)):
        try:
            return convert(kind, value, key)
        except (TypeError, ValueError) as error:
            if get_origin(kind) in (Literal, list, dict) or is_dataclass(kind):
                first_error = first_error or error  # says more than the union's name does
    several = len([kind for kind in kinds if kind is not types.NoneType]) > 1
    if first_error is not None and not several:
        raise first_error
    raise TypeError(f"{key}: expected {' or '.join(map(type_name, kinds))}, got {_described(value)}")


def _require(right: bool, kind: Any, value: Any, key: str) -> None:
    if not right:
        raise TypeError(f"{key}: expected {type_name(kind)}, got {_described(value)}")


def _described(value: Any) -> str:
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def _join(key: str, name: Any) -> str:
    shown = str(name) or repr(name)
    return f"{key}.{shown}" if key else shown
