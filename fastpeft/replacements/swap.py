"""Replacement of layers of PEFT that stand for themselves, by a swap of `__class__`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..integrations import peft
from ..integrations.accelerate import forward_is_its_class_s, has_hook_on_its_forward, rebind_hooked_forward
from ..layers.counting import outcomes
from .base import Left, Match


def why_not_swapped(module: nn.Module) -> Left | None:
    """Why a layer of PEFT cannot have a class of ours: its forward is someone else's already."""
    if not peft.has_stock_forward(type(module)):
        return Left(f"{type(module).__name__}.forward was replaced by another library")
    if "forward" in module.__dict__ and not (forward_is_its_class_s(module) or has_hook_on_its_forward(module)):
        return Left("forward was replaced on the instance")
    return None


class ClassSwap:
    """All of a replacement but `classes` and `mixture`; what matches is told by its very class.

    Attributes:
        mixture: what our classes have in common; has `leave`, `fastpeft_suspended` and the name of its op, `op_name`.
    """

    switch = "lora"
    mixture: type[Any]

    def classes(self) -> dict[type[nn.Module], type[Any]]:
        """PEFT's class -> ours."""
        raise NotImplementedError

    def match(self, module: nn.Module) -> Match | Left | None:
        fast = self.classes().get(type(module))
        return None if fast is None else Match(fast.op_name)

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        return why_not_swapped(module) or matched

    def install(self, module: nn.Module, proved: Match) -> None:
        stock = type(module)
        module.__class__ = fast = self.classes()[stock]
        rebind_hooked_forward(module, stock, fast)

    def installed(self, module: nn.Module) -> Match | None:
        return Match(module.op_name) if isinstance(module, self.mixture) else None

    def finish(self, root: nn.Module, modules: dict[str, nn.Module], setting: Any) -> None:
        pass

    def undo(self, module: nn.Module) -> bool:
        if not isinstance(module, self.mixture):
            return False
        module.leave()
        fast: type[nn.Module] = type(module)
        stock = next((stock for stock, ours in self.classes().items() if ours is fast), None)
        if stock is None:  # FSDP2 has put a class of its own before ours
            module.fastpeft_suspended = True
            return True
        module.__class__ = stock
        rebind_hooked_forward(module, fast, stock)
        return True

    def status(self, module: nn.Module) -> tuple[str, str]:
        total, calls = outcomes(module)
        return "", "; ".join(f"{count} of {total} calls by PEFT: {reason}" for reason, count in calls.items())
