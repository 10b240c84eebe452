"""PEFT's wrappers of stacked experts -> the same wrappers with a fused forward, by a swap of `__class__`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..integrations.accelerate import rebind_hooked_forward
from ..layers.counting import outcomes
from ..layers.experts import FastExperts, fast_class, stock_wrapper, wrappers
from ..layers.experts_structure import candidates, proved, settings
from .base import Left, Match
from .swap import why_not_swapped

OP = "lora_experts"


class ExpertsReplacement:
    """LoRA on stacked parameters of experts, `LoraConfig(target_parameters=...)`."""

    switch = "lora"
    adapts = True

    def match(self, module: nn.Module) -> Match | Left | None:
        if type(module) is not stock_wrapper():
            return None
        base: nn.Module = module.get_base_layer()  # type: ignore[operator]
        wanted = candidates(base)
        stacks = {name for roles in wanted for name in (roles.inner, roles.down)}
        if module.parameter_name not in stacks:
            return Left(f"no op for lora.ParamWrapper over {module.parameter_name} of {type(base).__name__}")
        return Match(OP, wanted)

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        if (left := why_not_swapped(module)) is not None:
            return left
        roles = proved(module.get_base_layer(), matched.found)  # type: ignore[operator]
        return Left(roles) if isinstance(roles, str) else Match(matched.op, roles)

    def install(self, module: nn.Module, proved: Match) -> None:
        stock, fast = type(module), fast_class()
        module.__class__ = fast
        rebind_hooked_forward(module, stock, fast)
        module.fastpeft_roles = proved.found
        module.fastpeft_settings = settings(module.get_base_layer())  # type: ignore[operator, assignment]

    def installed(self, module: nn.Module) -> Match | None:
        return Match(OP) if isinstance(module, FastExperts) else None

    def finish(self, root: nn.Module, modules: dict[str, nn.Module], setting: Any) -> None:
        for module in modules.values():  # outer ones come first
            module.__dict__.pop("fastpeft_suspended", None)
            inside = wrappers(module)
            for wrapper in inside:
                wrapper.fastpeft_wrappers = max(len(inside), wrapper.fastpeft_wrappers)

    def undo(self, module: nn.Module) -> bool:
        if not isinstance(module, FastExperts):
            return False
        stock, fast = stock_wrapper(), type(module)
        if fast is not fast_class():  # FSDP2 has put a class of its own before ours
            module.fastpeft_suspended = True
            return True
        module.leave()
        module.__class__ = stock  # type: ignore[assignment]
        rebind_hooked_forward(module, fast, stock)
        return True

    def status(self, module: nn.Module) -> tuple[str, str]:
        total, calls = outcomes(module)
        count: int = module.fastpeft_wrappers  # type: ignore[assignment]
        notes = [f"{times} of {total} calls by PEFT: {reason}" for reason, times in calls.items()]
        return "" if count == 1 else f"one of {count}", "; ".join(notes)
