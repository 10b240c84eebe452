"""MLPs -> the same modules with a fused forward, by a swap of `__class__`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.counting import outcomes
from ..layers.mixing import swap_in
from ..layers.mlp import UNTILED, FastMlp
from ..layers.mlp_structure import candidates, has_activation, proved
from .base import Left, Match
from .swap import why_not_its_own

OP = "lora_mlp"
RECOMPUTE = "recompute"
"""Value of the switch for which backward computes gate and up again, and nothing of them is kept."""


class MlpReplacement:
    """down(act(gate(x)) * up(x)) and down(act(up(x))), over nn.Linear and bitsandbytes' Linear4bit."""

    switch = "mlp"
    adapts = True

    def match(self, module: nn.Module) -> Match | Left | None:
        wanted = candidates(module)
        return Match(OP, wanted) if wanted else None

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        if replaced := why_not_its_own(module):
            return replaced
        roles = proved(module, matched.found)
        if not isinstance(roles, str):
            return Match(matched.op, roles)
        return Left(roles if has_activation(module) else "")  # projections alone may be anything: attention has some

    def install(self, module: nn.Module, proved: Match) -> None:
        roles = proved.found
        swap_in(module, FastMlp)  # it is there where `undo` could not take our class away
        module.fastpeft_roles = roles
        # a tuple, so that torch does not take them for children once more
        module.fastpeft_bypassed = tuple(module.get_submodule(name) for name in roles.bypassed)  # type: ignore[assignment]

    def installed(self, module: nn.Module) -> Match | None:
        if not isinstance(module, FastMlp) or module.fastpeft_roles is None:
            return None
        if module.fastpeft_tile:
            return Match(f"{OP}, {module.fastpeft_tile} tokens at a time")
        return Match(OP if module.fastpeft_keep else f"{OP}, gate and up computed again")

    def finish(self, root: nn.Module, modules: dict[str, nn.Module], setting: Any) -> None:
        for module in modules.values():
            module.fastpeft_keep = setting != RECOMPUTE  # type: ignore[assignment]
            module.fastpeft_tile = 0  # type: ignore[assignment]

    def undo(self, module: nn.Module) -> bool:
        if not isinstance(module, FastMlp) or module.fastpeft_roles is None:
            return False
        module.leave()
        return True

    def status(self, module: nn.Module) -> tuple[str, str]:
        total, calls = outcomes(module)
        return "", "; ".join(
            f"{count} of {total} calls {why}"
            if why.startswith(UNTILED)
            else f"{count} of {total} calls part by part: {why}"
            for why, count in calls.items()
        )
