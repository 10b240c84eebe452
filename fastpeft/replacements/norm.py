"""Norms of models' own classes -> the same modules with a fused forward, by a swap of `__class__`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..layers.norm import FastNorm
from ..layers.norm_proof import proved
from ..layers.norm_structure import Norm, candidates, changed
from .base import Left, Match
from .swap import MixedIn, why_not_its_own


class NormReplacement(MixedIn):
    """RMSNorm in every form that models have, and LayerNorm that is written out; torch's own are one operation."""

    mixture = FastNorm
    attribute = "fastpeft_norm"
    calls = "fastpeft_calls"
    other = "its own forward"

    def op(self, found: Norm) -> str:
        return found.op

    def match(self, module: nn.Module) -> Match | Left | None:
        wanted = candidates(module)
        return Match("", wanted) if wanted else None

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        if replaced := why_not_its_own(module):
            return replaced
        norm = proved(module, matched.found)
        return Left(norm) if isinstance(norm, str) else Match(norm.op, norm)

    def finish(self, root: nn.Module, modules: dict[str, nn.Module], setting: Any) -> None:
        """Those whose weight was cast, or a setting changed, since they were proved are proved anew."""
        for module in modules.values():
            norm, weight = getattr(module, self.attribute), module._parameters.get("weight")
            if (weight is None or weight.dtype == norm.weight_dtype) and changed(module, norm) is None:
                continue
            self.undo(module)
            matched = self.match(module)
            proved = self.prove(module, matched) if isinstance(matched, Match) else None
            if isinstance(proved, Match):
                self.install(module, proved)
