"""MLPs -> the same modules with a fused forward, by a swap of `__class__`."""

from __future__ import annotations

from torch import nn

from ..integrations.accelerate import forward_is_its_class_s, has_hook_on_its_forward, rebind_hooked_forward
from ..layers.mlp import FastMlp, fast_class
from ..layers.mlp_structure import candidates, has_activation, proved
from .base import Left, Match

OP = "lora_mlp"


class MlpReplacement:
    """down(act(gate(x)) * up(x)) and down(act(up(x))), over nn.Linear and bitsandbytes' Linear4bit."""

    switch = "mlp"

    def match(self, module: nn.Module) -> Match | Left | None:
        return Match(OP) if candidates(module) else None

    def prove(self, module: nn.Module) -> Left | None:
        if "forward" in module.__dict__ and not (forward_is_its_class_s(module) or has_hook_on_its_forward(module)):
            return Left("forward was replaced on the instance")
        wanted = candidates(module)
        roles = proved(module, wanted)
        if not isinstance(roles, str):
            return None
        return Left(roles if has_activation(module) else "")  # projections alone may be anything: attention has some

    def install(self, module: nn.Module) -> None:
        roles = proved(module, candidates(module))
        assert not isinstance(roles, str)
        stock = type(module)
        if not isinstance(module, FastMlp):  # it is where `undo` could not take our class away
            module.__class__ = fast = fast_class(stock)
            rebind_hooked_forward(module, stock, fast)
        module.fastpeft_roles = roles  # type: ignore[assignment]
        # a tuple, so that torch does not take them for children once more
        module.fastpeft_bypassed = tuple(module.get_submodule(name) for name in roles.bypassed)  # type: ignore[assignment]

    def installed(self, module: nn.Module) -> Match | None:
        return Match(OP) if isinstance(module, FastMlp) and module.fastpeft_roles is not None else None

    def finish(self, root: nn.Module, modules: dict[str, nn.Module]) -> None:
        pass

    def undo(self, module: nn.Module) -> bool:
        if not isinstance(module, FastMlp) or module.fastpeft_roles is None:
            return False
        module.leave()
        return True

    def status(self, module: nn.Module) -> tuple[str, str]:
        calls: dict[str, int] = dict(getattr(module, "fastpeft_calls", {}))
        total, _ = sum(calls.values()), calls.pop("fused", 0)
        return "", "; ".join(f"{count} of {total} calls part by part: {reason}" for reason, count in calls.items())
