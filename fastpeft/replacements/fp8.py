"""`accelerate(fp8_compute=..., fp8_exclude=...)`: which layers it is about, and whether it can be done."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from fastpeft_kernels.fp8 import fp8_refusal

from ..layers.fp8 import BOTH, FORWARD, NEVER, SETTINGS, ask, is_fp8_linear, products_of, why_not_fp8
from ..layers.lora import FastLoraLayer

EXCLUDED = "named by fp8_exclude"


def check_fp8(model: nn.Module, setting: Any, exclude: Any, lora: bool) -> None:
    """Raise TypeError or ValueError unless `accelerate` can do what its arguments of these names ask."""
    if setting is not None and setting not in SETTINGS:
        raise ValueError(f"fp8_compute: expected None or one of {SETTINGS}, got {setting!r}")
    listed = isinstance(exclude, Collection) and not isinstance(exclude, str)  # no iterator, which could be read once
    if not listed or not all(isinstance(pattern, str) for pattern in exclude):
        raise TypeError(f"fp8_exclude: expected a list of patterns of modules' names, got {exclude!r}")
    in_fp8 = setting in (FORWARD, BOTH)
    if in_fp8 and not lora:
        raise ValueError(f"fp8_compute: expected None with lora=False, got {setting!r}")
    if exclude and not in_fp8:
        raise ValueError(f"fp8_exclude: expected no patterns without products in FP8, got fp8_compute={setting!r}")
    names = [name for name, _ in model.named_modules()]
    if idle := [pattern for pattern in exclude if not any(fnmatchcase(name, pattern) for name in names)]:
        raise ValueError(f"fp8_exclude: expected patterns that match a module's name, got {idle}")
    if in_fp8:
        for device in {parameter.device for parameter in model.parameters()}:
            if (found := fp8_refusal(device)) is not None:
                raise ValueError(f"fp8_compute: expected a GPU of compute capability 8.9 or newer, got {found}")


def ask_fp8(modules: Mapping[str, nn.Module], setting: str | None, exclude: Sequence[str]) -> None:
    """Ask it for every LoRA layer of ours among `modules`; what is left out says why."""
    for path, layer in modules.items():
        if not isinstance(layer, FastLoraLayer):
            continue
        base, left = layer.get_submodule("base_layer"), None
        if setting in (FORWARD, BOTH):
            left = EXCLUDED if any(fnmatchcase(path, pattern) for pattern in exclude) else why_not_fp8(base)
        layer.fastpeft_fp8_left = left
        wanted = setting if left is None else NEVER
        ask(base, None if wanted == NEVER and not is_fp8_linear(base) else wanted)
        layer.make_fp8()


def words(base: nn.Module) -> str:
    """What the report adds to the op over a base layer."""
    products = products_of(base)
    if products is None:
        return ""
    return {NEVER: ", products with the decoded weight", FORWARD: ", x W^T in FP8", BOTH: ", in FP8"}[products.setting]
