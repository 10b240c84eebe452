"""PEFT's LoRA layers -> the same layers with a fused forward, by a swap of `__class__`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..integrations import bitsandbytes, peft
from ..integrations.accelerate import rebind_hooked_forward
from ..layers.lora import FastLoraLayer, fast_classes
from ..layers.siblings import SiblingWatch
from .base import Left, Match

_UNDO = "fastpeft_undo"


class LoraReplacement:
    """LoRA over nn.Linear and bitsandbytes' Linear4bit."""

    switch = "lora"

    def match(self, module: nn.Module) -> Match | Left | None:
        from peft.tuners.lora import LoraLayer
        from peft.tuners.tuners_utils import BaseTunerLayer

        if type(module) in fast_classes():
            base = module.get_submodule("base_layer")
            kind = bitsandbytes.linear_4bit() if bitsandbytes.is_linear_4bit(base) else nn.Linear
            if type(base) is not kind:
                return Left(f"no op for a base layer of type {type(base).__name__}")
            if getattr(module, "lora_variant", None) and set(module.lora_variant) >= set(module.active_adapters):  # type: ignore[operator,arg-type]
                names = sorted({type(variant).__name__ for variant in module.lora_variant.values()})  # type: ignore[union-attr,operator]
                return Left(f"no op for this LoRA variant yet ({', '.join(names)})")
            return Match(_op(module))
        if isinstance(module, LoraLayer):
            return Left(f"no op for lora.{type(module).__name__} yet")
        if isinstance(module, BaseTunerLayer):
            return Left(f"no op for {type(module).__module__.rpartition('.')[0]}.{type(module).__name__} yet")
        return None

    def prove(self, module: nn.Module) -> Left | None:
        if not peft.has_stock_forward(type(module)):
            return Left(f"{type(module).__name__}.forward was replaced by another library")
        if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:
            return Left("forward was replaced on the instance")
        return None

    def install(self, module: nn.Module) -> None:
        stock = type(module)
        fast = fast_classes()[stock]
        base: Any = module.get_submodule("base_layer")
        module.__dict__[_UNDO] = bitsandbytes.forbid_cpu_packing(base)
        module.__class__ = fast
        rebind_hooked_forward(module, stock, fast)

    def installed(self, module: nn.Module) -> Match | None:
        return Match(_op(module)) if isinstance(module, FastLoraLayer) else None

    def finish(self, root: nn.Module, modules: dict[str, nn.Module]) -> None:
        alone = {
            path: module
            for path, module in modules.items()
            if isinstance(module, FastLoraLayer) and module.fastpeft_group is None
        }
        _stop_watching(root)
        if alone:
            root.__dict__["fastpeft_watch"] = SiblingWatch(root, alone)

    def undo(self, module: nn.Module) -> bool:
        _stop_watching(module)
        if not isinstance(module, FastLoraLayer):
            return False
        if module.fastpeft_group is not None:
            module.fastpeft_group.dissolve()
        fast = type(module)
        stock = next(stock for stock, ours in fast_classes().items() if ours is fast)
        module.__class__ = stock
        rebind_hooked_forward(module, fast, stock)
        bitsandbytes.allow_cpu_packing(module.get_submodule("base_layer"), module.__dict__.pop(_UNDO, None))
        module.__dict__.pop("fastpeft_calls", None)
        return True

    def status(self, module: nn.Module) -> tuple[str, str]:
        group = getattr(module, "fastpeft_group", None)
        partners = "" if group is None else f"one of {len(group.members)}"
        calls: dict[str, int] = dict(getattr(module, "fastpeft_calls", {}))
        fused = calls.pop("fused", 0)
        notes = [f"{count} of {fused + sum(calls.values())} calls by PEFT: {reason}" for reason, count in calls.items()]
        return partners, "; ".join(notes)


def _op(module: nn.Module) -> str:
    four_bit = bitsandbytes.is_linear_4bit(module.get_submodule("base_layer"))
    return "lora_linear over 4-bit" if four_bit else "lora_linear"


def _stop_watching(root: nn.Module) -> None:
    watch = root.__dict__.pop("fastpeft_watch", None)
    if watch is not None:
        watch.stop()
