"""Replacements by a swap of `__class__`: of layers of PEFT that stand for themselves, and of modules of any class."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..integrations.accelerate import forward_is_its_class_s, has_hook_on_its_forward, rebind_hooked_forward
from ..integrations.tuner_layers import has_stock_forward
from ..layers.counting import outcomes
from ..layers.mixing import swap_in
from .base import Left, Match


def why_not_its_own(module: nn.Module) -> Left | None:
    """Why a module's forward is not its class's, nor that of an accelerate hook, which ends in its class's."""
    if "forward" in module.__dict__ and not (forward_is_its_class_s(module) or has_hook_on_its_forward(module)):
        return Left("forward was replaced on the instance")
    return None


def why_not_swapped(module: nn.Module) -> Left | None:
    """Why a layer of PEFT cannot have a class of ours: its forward is someone else's already."""
    if not has_stock_forward(type(module)):
        return Left(f"{type(module).__name__}.forward was replaced by another library")
    return why_not_its_own(module)


class MixedIn:
    """All of a replacement by `mixing.mixed` but `match` and `prove`; what was proved is an attribute of the module.

    Attributes:
        mixture: our class before the module's own; has `leave`.
        attribute: what was proved; None on the class.
        calls: the attribute in which the module counts its calls.
        other: what serves the calls that the op does not.
    """

    switch = "norms"
    adapts = False
    mixture: type[Any]
    attribute: str
    calls: str
    other: str

    def op(self, found: Any) -> str:
        """The op's name in the report."""
        raise NotImplementedError

    def install(self, module: nn.Module, proved: Match) -> None:
        swap_in(module, self.mixture)  # it is there where `undo` could not take our class away
        setattr(module, self.attribute, proved.found)

    def installed(self, module: nn.Module) -> Match | None:
        found = getattr(module, self.attribute) if isinstance(module, self.mixture) else None
        return None if found is None else Match(self.op(found))

    def finish(self, root: nn.Module, modules: dict[str, nn.Module], setting: Any) -> None:
        pass

    def undo(self, module: nn.Module) -> bool:
        if self.installed(module) is None:
            return False
        module.leave()  # type: ignore[operator]
        return True

    def status(self, module: nn.Module) -> tuple[str, str]:
        total, calls = outcomes(module, self.calls)
        if list(calls.values()) == [total]:  # as on a CPU: what is so in every call needs no count
            return "", f"every call by {self.other}: {next(iter(calls))}"
        return "", "; ".join(f"{count} of {total} calls by {self.other}: {why}" for why, count in calls.items())


class ClassSwap:
    """All of a replacement but `classes` and `mixture`; what matches is told by its very class.

    Attributes:
        mixture: what our classes have in common: `fastpeft_suspended`, counted calls, and their op's name, `op_name`.
    """

    switch = "lora"
    adapts = True
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
        for name in ("fastpeft_calls", "fastpeft_suspended"):
            module.__dict__.pop(name, None)
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
