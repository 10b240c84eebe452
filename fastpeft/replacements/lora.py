"""PEFT's LoRA layers -> the same layers with a fused forward, by a swap of `__class__`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..integrations import bitsandbytes, dora, peft, quantised
from ..integrations.accelerate import rebind_hooked_forward
from ..integrations.transformers import is_conv1d, is_own_linear
from ..layers.bypass import own_class
from ..layers.counting import outcomes
from ..layers.few_tokens import FEW_TOKENS
from ..layers.frozen import FrozenSibling
from ..layers.lora import FastLoraLayer, fast_classes
from ..layers.watching import watch
from .base import Left, Match
from .fp8 import words
from .swap import why_not_swapped

FROZEN = "frozen_linear"


class LoraReplacement:
    """LoRA and VeRA over nn.Linear and quantised layers, and what is frozen beside it and reads the same input."""

    switch = "lora"
    adapts = True

    def match(self, module: nn.Module) -> Match | Left | None:
        from peft.tuners.lora import LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer

        if type(module) in fast_classes():
            base = module.get_submodule("base_layer")
            dense = own_class(base) is nn.Linear or is_conv1d(base) or is_own_linear(base)
            if not dense and not bitsandbytes.is_linear_4bit(base) and quantised.reader(base) is None:
                return Left(f"no op for a base layer of type {type(base).__name__}")
            variants: dict[str, Any] = getattr(module, "lora_variant", {})
            left = {name: type(variant).__name__ for name, variant in variants.items() if not serves(variant)}
            if left and set(left) >= set(module.active_adapters):  # type: ignore[arg-type]
                return Left(f"no op for this LoRA variant yet ({', '.join(sorted(set(left.values())))})")
            return Match(_op(module))
        if isinstance(module, LoraLayer):
            return Left(f"no op for lora.{type(module).__name__} yet")
        if isinstance(module, BaseTunerLayer):
            return Left(f"no op for {type(module).__module__.rpartition('.')[0]}.{type(module).__name__} yet")
        return None

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        return why_not_swapped(module) or matched

    def install(self, module: nn.Module, proved: Match) -> None:
        base, stock = module.get_submodule("base_layer"), type(module)
        if isinstance(base, FrozenSibling):  # it has got adapters since
            base.ungroup()
        fast = fast_classes()[stock]
        module.__class__ = fast
        rebind_hooked_forward(module, stock, fast)

    def installed(self, module: nn.Module) -> Match | None:
        frozen = isinstance(module, FrozenSibling) and module.is_member()  # comes and goes with its group
        return Match(_op(module)) if frozen or isinstance(module, FastLoraLayer) else None

    def finish(self, root: nn.Module, modules: dict[str, nn.Module], setting: Any) -> None:
        layers = {path: module for path, module in modules.items() if isinstance(module, FastLoraLayer)}
        fresh = {
            path.rpartition(".")[0] for path, layer in layers.items() if "fastpeft_cpu_packing" not in layer.__dict__
        }
        for path, layer in layers.items():
            layer.enter()
            group = layer.fastpeft_group
            parent = path.rpartition(".")[0]
            if group is not None and (
                parent in fresh or not layer.is_member() or not group.is_below(root.get_submodule(parent))
            ):
                layer.ungroup()
        alone = {path: layer for path, layer in layers.items() if layer.fastpeft_group is None}
        if alone:
            watch(root, alone)

    def undo(self, module: nn.Module) -> bool:
        if isinstance(module, FrozenSibling):
            module.ungroup()
            return True
        if not isinstance(module, FastLoraLayer):
            return False
        module.leave()
        module.__dict__.pop("fastpeft_watch_error", None)
        fast: type[nn.Module] = type(module)
        stock = next((stock for stock, ours in fast_classes().items() if ours is fast), None)
        if stock is None:  # FSDP2 has put a class of its own before ours
            module.fastpeft_suspended = True
            return True
        module.__class__ = stock  # type: ignore[assignment]
        rebind_hooked_forward(module, fast, stock)
        return True

    def status(self, module: nn.Module) -> tuple[str, str]:
        group = getattr(module, "fastpeft_group", None)
        partners = "" if group is None or not group.members else f"one of {len(group.members)}"
        total, calls = outcomes(module)
        few = calls.pop(FEW_TOKENS, 0)
        if isinstance(module, FrozenSibling):
            notes = [f"{count} of {total} calls by itself: {reason}" for reason, count in calls.items()]
        else:
            notes = [f"{count} of {total} calls by PEFT: {reason}" for reason, count in calls.items()]
        if few:
            notes.append(f"{few} of {total} calls as PEFT computes them, {FEW_TOKENS}")
        if (error := getattr(module, "fastpeft_watch_error", None)) is not None:
            notes.append(f"siblings not found: {error}")
        if (left := getattr(module, "fastpeft_fp8_left", None)) is not None:
            notes.append(f"fp8_compute: left in 16 bits, {left}")
        base = _base(module)
        if bitsandbytes.is_linear_4bit(base) and (note := bitsandbytes.decode_note(base)):
            notes.append(note)
        return partners, "; ".join(notes)


def serves(variant: Any) -> bool:
    """Whether a layer's own forward can do what a LoRA variant computes."""
    return dora.is_dora(variant) or peft.is_plain(variant)


def _op(module: nn.Module) -> str:
    name = FROZEN if isinstance(module, FrozenSibling) else _class_of(module).op_name
    base = _base(module)
    if bitsandbytes.is_linear_4bit(base):
        return f"{name} over 4-bit"
    reader = quantised.reader(base)
    name = name if reader is None else f"{name} over {reader.name(base)}"
    return name + words(base)


def _class_of(module: nn.Module) -> type[FastLoraLayer]:
    """Ours, that the layer has or would have."""
    return type(module) if isinstance(module, FastLoraLayer) else fast_classes()[type(module)]


def _base(module: nn.Module) -> nn.Module:
    return module if isinstance(module, FrozenSibling) else module.get_submodule("base_layer")
