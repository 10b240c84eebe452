"""Which ops have cases: each module here with a function `cases(device, depth)`."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from importlib import import_module

from .case import OpCase

Cases = Callable[[str, str], Iterator[OpCase]]


def ops() -> dict[str, tuple[str, Cases]]:
    """By name of the op: what is measured, in a line, and its cases for a device ("cpu", "cuda") and a depth."""
    package = __package__ or ""
    names = sorted(found.name for found in pkgutil.iter_modules(import_module(package).__path__))
    modules = {name: import_module(f"{package}.{name}") for name in names}
    return {
        name: ((module.__doc__ or "").partition("\n")[0], module.cases)
        for name, module in modules.items()
        if hasattr(module, "cases")
    }
