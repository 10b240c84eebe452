"""A model of transformers or PEFT within what others put around it: Lightning's module, a sentence encoder."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .transformers import is_model_class

_WRAPPERS = {
    "peft.peft_model": "PeftModel",
    "peft.mixed_model": "PeftMixedModel",
    "peft.tuners.tuners_utils": "BaseTuner",
}
"""PEFT's classes around a model, by their files."""


def is_model(module: nn.Module) -> bool:
    """Whether it is one of transformers' models, or what PEFT puts around a model."""
    homes = [(sys.modules.get(home), name) for home, name in _WRAPPERS.items()]
    wrappers = tuple(getattr(home, name) for home, name in homes if home is not None)
    return is_model_class(type(module)) or isinstance(module, wrappers)


def model_within(module: nn.Module) -> Any:
    """The one model of transformers or PEFT that a module is or holds; the module itself if it has none or several."""
    if is_model(module):
        return module
    found: dict[str, nn.Module] = {}
    for path, each in module.named_modules():
        if is_model(each) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = each
    return found.popitem()[1] if len(found) == 1 else module
