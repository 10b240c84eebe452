"""Packages that are needed now and then: one sentence where one is not installed, or too old."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from .integrations.versions import MINIMUM_OF_EXTRAS, too_old

EXTRAS = ("train", "multi", "bench", "bases", "dev", "docs")
EVERYWHERE = ("filelock", "platformdirs", "rich", "safetensors", "yaml")  # by their modules; pip brings them along


class MissingExtraError(ImportError):
    """A package that comes with one of EXTRAS is not installed, or too old; the message says how to install it."""


def require(extra: str, module: str, purpose: str = "this") -> ModuleType:
    """Import a module that comes with an extra.

    Args:
        extra: one of EXTRAS.
        module: its import name.
        purpose: what needs it, as the subject of a sentence: "the loss curve".

    Raises:
        MissingExtraError: it is not installed, or older than what is supported; says how to install it. One that fails
            to import raises its own error.
        ValueError: another extra.
    """
    if extra not in EXTRAS:
        raise ValueError(f"extra: expected one of {', '.join(EXTRAS)}, got {extra!r}")
    name = module.partition(".")[0]
    install = f'pip install "fastpeft[{extra}]"'
    if name in MINIMUM_OF_EXTRAS and (old := too_old(name)) and old != "not installed":
        raise MissingExtraError(f"{purpose} needs {name}>={MINIMUM_OF_EXTRAS[name]}, but {old}: {install}", name=name)
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MissingExtraError(f"{purpose} needs {name}, which is not installed: {install}", name=name) from error


def missing() -> list[str]:
    """Those of EVERYWHERE that are not installed, as in a tree that is used without being so. Imports none."""
    return [name for name in EVERYWHERE if not _is_there(name)]


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # told to be absent
        return False
