"""Attention modules that turn queries and keys -> the same modules, which do it in one pass."""

from __future__ import annotations

from torch import nn

from ..layers.rotary import FastRotary
from ..layers.rotary_structure import ELSEWHERE, UNKNOWN, Turn, names_elsewhere, own_functions, proved
from .base import Left, Match
from .swap import MixedIn, why_not_its_own

OP = "rotary"


class RotaryReplacement(MixedIn):
    """Modules whose forward calls a function of their file that turns queries, keys or both."""

    mixture = FastRotary
    attribute = "fastpeft_turn"
    calls = "fastpeft_turns"
    other = "the model's own function"

    def op(self, found: dict[str, Turn | None]) -> str:
        return OP

    def match(self, module: nn.Module) -> Match | Left | None:
        functions = own_functions(module)
        if functions is None or isinstance(functions, str):
            return None if functions is None else Left(functions)
        return Match(OP, functions)

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        if replaced := why_not_its_own(module):
            return replaced
        turns = proved(module, matched.found)
        return Left(turns) if isinstance(turns, str) else Match(OP, turns)

    def status(self, module: nn.Module) -> tuple[str, str]:
        """With the functions that are left to the model, by name."""
        state, note = super().status(module)
        turns: dict[str, Turn | None] = getattr(module, self.attribute)
        left = [f"{name}: {UNKNOWN}" for name, turn in turns.items() if turn is None]
        left += [f"{name}: {ELSEWHERE}" for name in names_elsewhere(module)]
        return state, "; ".join([*([note] if note else []), *left])
