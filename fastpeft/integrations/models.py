"""Models of transformers or PEFT within what others put around them: Lightning's module, a sentence encoder."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .transformers import is_model_class

_PEFT = {
    ("peft.peft_model", "PeftModel"): "base_model",
    ("peft.mixed_model", "PeftMixedModel"): "base_model",
    ("peft.tuners.tuners_utils", "BaseTuner"): "model",
}
_AROUND = _PEFT | {("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod"}
"""Classes around a module, by their files, and where they have it."""


def is_model(module: nn.Module) -> bool:
    """Whether it is one of transformers' models, compiled or not, or what PEFT puts around one.

    What PEFT puts around another module is a model too, unless that module holds one of transformers'.
    """
    within, of_peft = module, False
    while (found := _wrapped(within, _AROUND)) is not None:
        of_peft, within = of_peft or _wrapped(within, _PEFT) is not None, found
    return is_model_class(type(within)) or (of_peft and not _holds(within))


def is_around(module: nn.Module) -> bool:
    """Whether it is no model and holds some."""
    return not is_model(module) and any(map(is_model, module.modules()))


def model_within(module: nn.Module, kinds: tuple[type, ...], what: str, otherwise: str) -> Any:
    """The one model that a module is or holds, with all the layers that are meant; the module itself without models.

    Args:
        module: a model, or what holds some.
        kinds: of the layers that are meant.
        what: they are, for the error.
        otherwise: what to do where there is no one model.

    Raises:
        ValueError: such layers are in several models, or outside of them.
    """
    if is_model(module):
        return module
    named = dict(module.named_modules())
    models = {path: each for path, each in named.items() if is_model(each)}
    inner = {id(part) for model in models.values() for part in model.modules() if part is not model}
    models = {path: model for path, model in models.items() if id(model) not in inner}
    layers = {id(each): path for path, each in named.items() if isinstance(each, kinds)}
    chosen = {path: model for path, model in models.items() if any(id(part) in layers for part in model.modules())}
    if not chosen:
        return next(iter(models.values())) if len(models) == 1 else module
    within = {id(part) for model in chosen.values() for part in model.modules()}
    outside = [path for key, path in layers.items() if key not in within]
    if len(chosen) == 1 and not outside:
        return next(iter(chosen.values()))
    found = f"{len(chosen)} model{'s' if len(chosen) > 1 else ''} with such layers, {', '.join(chosen)}"
    if outside:
        found += f", and {len(outside)} outside, such as {outside[0]}"
    raise ValueError(
        f"model: expected all {what} in one model, got {type(module).__name__} that holds {found}; {otherwise}"
    )


def _wrapped(module: nn.Module, wrappers: dict[tuple[str, str], str]) -> nn.Module | None:
    """What one of these classes has within."""
    for (home, name), attribute in wrappers.items():
        kind = getattr(sys.modules.get(home), name, None)
        if kind is not None and isinstance(module, kind):
            within = module._modules.get(attribute)
            if within is not None:
                return within
    return None


def _holds(module: nn.Module) -> bool:
    return any(is_model_class(type(each)) for each in module.modules())
