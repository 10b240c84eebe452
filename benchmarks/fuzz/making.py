"""Inputs: valid ones, then damaged at a place of their structure, then at a place of their bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
VALUES = st.recursive(
    LEAVES,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=6), below, max_size=3),
    max_leaves=8,
)
"""Whatever JSON can hold."""
ODD = st.sampled_from(
    [
        *(0, -1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 1e-320, 1e308, float("inf"), float("nan"), True, None),
        *("", " ", "\x00", "\ud800", "\u2028", "a" * 5000, "../../x", "/dev/zero", "1e999", "nan", "9" * 5000),
        *([], {}, [[]], [{}], {"": None}, {"a": {"b": []}}, [None, 1, "a"]),
    ]
)
"""Values at the ends of what is expected, and beyond."""


@st.composite
def damaged(draw: Callable[..., Any], whole: st.SearchStrategy[Any]) -> Any:
    """A value with up to three of its parts replaced, left out or given again under another name."""
    value = draw(whole)
    for _ in range(draw(st.sampled_from((0, 0, 0, 1, 2, 3)))):
        value = _damage(draw, value)
    return value


def _damage(draw: Callable[..., Any], value: Any) -> Any:
    if isinstance(value, (dict, list)) and value and draw(st.integers(0, 3)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        whole = dict(value) if isinstance(value, dict) else list(value)
        how = draw(st.sampled_from(("below", "below", "without", "beside")))
        if how == "below":
            whole[key] = _damage(draw, whole[key])
        elif how == "without":
            del whole[key]
        elif isinstance(whole, dict):
            whole[draw(st.text(max_size=8))] = whole[key]
        else:
            whole += whole[key:]
        return whole
    return draw(ODD | VALUES)


@st.composite
def broken(draw: Callable[..., Any], texts: st.SearchStrategy[bytes]) -> bytes:
    """Bytes, two of three whole, the others with something cut off, put in or written over."""
    data: bytes = draw(texts)
    if not draw(st.sampled_from((False, False, True))):
        return data
    start = draw(st.integers(0, len(data)))
    end = min(len(data), start + draw(st.integers(0, 16)))
    return data[:start] + draw(st.binary(max_size=16)) + data[draw(st.sampled_from((start, end, len(data)))) :]


@st.composite
def part_of(draw: Callable[..., Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Some keys of nested mappings; all of them at first."""
    without = draw(st.sets(st.sampled_from(sorted(whole))))
    kept = {name: value for name, value in whole.items() if name not in without}
    return {name: draw(part_of(value)) if isinstance(value, dict) and value else value for name, value in kept.items()}


def as_json(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """JSON of values, or nearly so."""
    return broken(st.builds(_dumped, damaged(values), st.booleans()))


def as_lines(values: st.SearchStrategy[Any], most: int = 4) -> st.SearchStrategy[bytes]:
    """JSON lines of values, or nearly so."""
    lines = st.lists(st.builds(_dumped, damaged(values), st.booleans()), min_size=1, max_size=most)
    return broken(lines.map(b"\n".join))


def in_lines(values: list[Any]) -> st.SearchStrategy[bytes]:
    """JSON lines of these values, or nearly so."""
    lines = st.tuples(*(st.builds(_dumped, damaged(st.just(value)), st.booleans()) for value in values))
    return broken(lines.map(b"\n".join))


def _dumped(value: Any, escaped: bool) -> bytes:
    return json.dumps(value, ensure_ascii=escaped).encode("utf-8", "surrogatepass")
