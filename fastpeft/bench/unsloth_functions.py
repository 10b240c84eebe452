"""Unsloth's LoRA functions, without what `import unsloth` does to a process.

Its package runs code when imported that replaces parts of PyTorch, Transformers and TRL. The modules with its autograd
functions need none of that, but stand in packages that do; so an empty package of each name, over the installed
folder, is put in the package's place. `import unsloth` does not work afterwards in the same process.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .left_out import NotHereError, reason_of

_PACKAGES = ("unsloth", "unsloth.kernels", "unsloth_zoo", "unsloth_zoo.temporary_patches")


def load() -> Any:
    """`unsloth.kernels.fast_lora`. Raises NotHereError, which says why it is not to be had here."""
    functions, reason = _load()
    if functions is None:
        raise NotHereError(reason)
    return functions


@cache
def _load() -> tuple[Any, str]:
    if not torch.cuda.is_available():
        return None, "needs a GPU"
    before = set(sys.modules)
    try:
        for name in _PACKAGES:
            _empty_package(name)
        return import_module("unsloth.kernels.fast_lora"), ""
    except Exception as error:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("unsloth", "unsloth_zoo"):
                del sys.modules[name]
        return None, reason_of(error)


def _empty_package(name: str) -> None:
    if name in sys.modules:
        raise ImportError(f"{name} was imported already")
    parent, _, leaf = name.rpartition(".")
    if parent:
        places = [str(Path(place, leaf)) for place in sys.modules[parent].__path__]
    else:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"{name} is not installed")
        places = list(spec.submodule_search_locations)
    module = ModuleType(name)
    module.__path__ = places
    sys.modules[name] = module
