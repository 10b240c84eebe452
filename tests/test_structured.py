from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fastpeft.structured import build


@dataclass
class Inner:
    ratio: float
    tags: dict[str, int] = field(default_factory=dict)


@dataclass
class Outer:
    name: str
    inner: Inner | None = None
    several: list[Inner] = field(default_factory=list)
    either: int | str | list[int] = 0
    mode: Literal["a", 1] = "a"
    free: Any = None
    derived: int = field(default=3, init=False)


def test_nested_values() -> None:
    data = {"name": "x", "inner": {"ratio": 1}, "several": [{"ratio": 0.5, "tags": {"k": 2}}], "free": [object]}
    assert build(Outer, data) == Outer("x", Inner(1.0), [Inner(0.5, {"k": 2})], free=[object])


@pytest.mark.parametrize("value", [3, "three", [3, 4]])
def test_unions_take_each_of_their_types(value: object) -> None:
    assert build(Outer, {"name": "x", "either": value}).either == value


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, TypeError, r"top level: expected a mapping, got null"),
        ({}, ValueError, r"^name: expected a value, got none$"),
        ({"name": None}, TypeError, r"^name: expected str, got null$"),
        ({"name": "x", "derived": 1}, ValueError, r"^derived: unknown key"),
        ({"name": "x", "inner": {"ratio": True}}, TypeError, r"^inner\.ratio: expected float, got True \(bool\)$"),
        ({"name": "x", "inner": {}}, ValueError, r"^inner\.ratio: expected a value, got none$"),
        ({"name": "x", "inner": {"ratoi": 1}}, ValueError, r"inner\.ratoi: unknown key, did you mean 'inner\.ratio'\?"),
        ({"name": "x", "several": [{"ratio": 1}, 2]}, TypeError, r"^several\[1\]: expected a mapping, got 2 \(int\)$"),
        (
            {"name": "x", "inner": {"ratio": 1, "tags": {"k": "v"}}},
            TypeError,
            r"^inner\.tags\.k: expected int, got 'v'",
        ),
        ({"name": "x", "inner": {"ratio": 1, "tags": {1: 1}}}, TypeError, r"^inner\.tags: expected dict\[str, int\]"),
        ({"name": "x", "mode": True}, ValueError, r"^mode: expected one of 'a', 1, got True$"),
        ({"name": "x", "either": 1.5}, TypeError, r"^either: expected int or str or list\[int\], got 1\.5 \(float\)$"),
        ({1: 2}, ValueError, r"^1: unknown key, expected one of name, inner"),
    ],
)
def test_errors_name_the_key(data: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(Outer, data)
