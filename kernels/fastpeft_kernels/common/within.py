"""Values that hold for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

Value = TypeVar("Value")


@contextmanager
def within(variable: ContextVar[Value], value: Value) -> Iterator[None]:
    """Meanwhile the variable has this value, in this thread and context."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
