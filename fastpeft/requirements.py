"""Packages that are needed now and then, and versions that are too old: said in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType

EXTRAS = ("train", "multi", "bench", "bases", "dev", "docs")
# As in pyproject.toml, which a tree that is used without being installed does not bring.
MINIMUM = {"torch": "2.11", "transformers": "5.17", "peft": "0.18", "accelerate": "1.10", "bitsandbytes": "0.48"}
CORE = ("torch", "transformers", "peft")  # what accelerating a model cannot do without
EVERYWHERE = ("filelock", "platformdirs", "rich", "safetensors", "yaml")  # by their modules; pip brings them along


class MissingExtraError(ImportError):
    """A package that comes with one of EXTRAS is not installed; the message says how to install it."""


def require(extra: str, module: str, purpose: str = "this") -> ModuleType:
    """Import a module that comes with an extra.

    Args:
        extra: one of EXTRAS.
        module: its import name.
        purpose: what needs it, as the subject of a sentence: "the loss curve".

    Raises:
        MissingExtraError: it is not installed; says how to install it. One that fails to import raises its own error.
        ValueError: another extra.
    """
    if extra not in EXTRAS:
        raise ValueError(f"extra: expected one of {', '.join(EXTRAS)}, got {extra!r}")
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        name = error.name
        message = f'{purpose} needs {name}, which is not installed: pip install "fastpeft[{extra}]"'
        raise MissingExtraError(message, name=name) from error


def check_versions(packages: Iterable[str] = MINIMUM) -> str | None:
    """One sentence about packages that are missing or older than MINIMUM; None when all is well. Imports none."""
    found = ((name, MINIMUM[name], _too_old(name, MINIMUM[name])) for name in packages)
    wrong = [f"{name}>={least} ({have})" for name, least, have in found if have]
    return f"fastpeft needs {', '.join(wrong)}: pip install --upgrade fastpeft" if wrong else None


def missing() -> list[str]:
    """Those of EVERYWHERE that are not installed, as in a tree that is used without being so. Imports none."""
    return [name for name in EVERYWHERE if not _is_there(name)]


@cache
def require_core() -> None:
    """Raise ImportError, in one sentence, unless CORE is installed and new enough."""
    if problem := check_versions(CORE):
        raise ImportError(problem)


def _too_old(package: str, least: str) -> str | None:
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
    return f"{installed} is installed" if _release(installed) < _release(least) else None


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers: (2, 13, 0) of "2.13.0+cpu"; trailing parts such as rc1 and dev0 are left out."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # told to be absent
        return False
