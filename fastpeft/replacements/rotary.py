"""Attention modules that turn queries and keys -> the same modules, which do it in one pass."""

from __future__ import annotations

from torch import nn

from ..layers.rotary import FastRotary
from ..layers.rotary_structure import Turn, own_function, proved
from .base import Left, Match
from .swap import MixedIn, why_not_its_own

OP = "rotary"


class RotaryReplacement(MixedIn):
    """Modules whose forward calls their file's `apply_rotary_pos_emb(q, k, cos, sin)`."""

    mixture = FastRotary
    attribute = "fastpeft_turn"
    calls = "fastpeft_turns"
    other = "the model's own function"

    def op(self, found: Turn) -> str:
        return OP

    def match(self, module: nn.Module) -> Match | Left | None:
        function = own_function(module)
        if function is None or isinstance(function, str):
            return None if function is None else Left(function)
        return Match(OP, function)

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        if replaced := why_not_its_own(module):
            return replaced
        turn = proved(module, matched.found)
        return Left(turn) if isinstance(turn, str) else Match(OP, turn)
