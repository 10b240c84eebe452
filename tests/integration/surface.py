"""What PEFT's classes have in public."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def public(kind: type) -> dict[str, object]:
    """Members of a class and its bases, those of torch excepted, by name."""
    found: dict[str, object] = {}
    for base in kind.__mro__:
        if base in nn.Module.__mro__:
            continue
        for name, member in vars(base).items():
            if not name.startswith("_"):
                found.setdefault(name, member)
    return found


def methods_of(kind: type) -> set[str]:
    return {
        name
        for name, member in public(kind).items()
        if callable(member) or isinstance(member, (classmethod, staticmethod))
    }


def properties_of(kind: type) -> set[str]:
    return {name for name, member in public(kind).items() if isinstance(member, property)}


def subclasses(kind: type) -> Iterator[type]:
    """All that were imported; none that torch makes of a model, as FSDP does, and keeps until it is collected."""
    for below in kind.__subclasses__():
        if not below.__name__.startswith("FSDP"):
            yield below
        yield from subclasses(below)
