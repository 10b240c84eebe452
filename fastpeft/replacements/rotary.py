"""Attention modules that turn queries and keys -> the same modules, which do it in one pass."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..integrations.accelerate import forward_is_its_class_s, has_hook_on_its_forward
from ..layers.counting import outcomes
from ..layers.mixing import swap_in
from ..layers.rotary import FastRotary
from ..layers.rotary_structure import own_function, proved
from .base import Left, Match

OP = "rotary"


class RotaryReplacement:
    """Modules whose forward calls their file's `apply_rotary_pos_emb(q, k, cos, sin)`."""

    switch = "norms"

    def match(self, module: nn.Module) -> Match | Left | None:
        function = own_function(module)
        if function is None or isinstance(function, str):
            return None if function is None else Left(function)
        return Match(OP, function)

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        if "forward" in module.__dict__ and not (forward_is_its_class_s(module) or has_hook_on_its_forward(module)):
            return Left("forward was replaced on the instance")
        turn = proved(module, matched.found)
        return Left(turn) if isinstance(turn, str) else Match(OP, turn)

    def install(self, module: nn.Module, proved: Match) -> None:
        swap_in(module, FastRotary)  # it is there where `undo` could not take our class away
        module.fastpeft_turn = proved.found

    def installed(self, module: nn.Module) -> Match | None:
        return Match(OP) if isinstance(module, FastRotary) and module.fastpeft_turn is not None else None

    def finish(self, root: nn.Module, modules: dict[str, nn.Module], setting: Any) -> None:
        pass

    def undo(self, module: nn.Module) -> bool:
        if not isinstance(module, FastRotary) or module.fastpeft_turn is None:
            return False
        module.leave()
        return True

    def status(self, module: nn.Module) -> tuple[str, str]:
        total, calls = outcomes(module, "fastpeft_turns")
        notes = (f"{count} of {total} calls by the model's own function: {reason}" for reason, count in calls.items())
        return "", "; ".join(notes)
