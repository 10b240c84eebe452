"""Norms of models' own classes -> the same modules with a fused forward, by a swap of `__class__`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..integrations.accelerate import forward_is_its_class_s, has_hook_on_its_forward
from ..layers.counting import outcomes
from ..layers.mixing import swap_in
from ..layers.norm import FastNorm
from ..layers.norm_structure import candidates, proved
from .base import Left, Match


class NormReplacement:
    """RMSNorm in every form that models have, and LayerNorm that is written out; torch's own are one operation."""

    switch = "norms"

    def match(self, module: nn.Module) -> Match | Left | None:
        wanted = candidates(module)
        return Match("", wanted) if wanted else None

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        if "forward" in module.__dict__ and not (forward_is_its_class_s(module) or has_hook_on_its_forward(module)):
            return Left("forward was replaced on the instance")
        norm = proved(module, matched.found)
        return Left(norm) if isinstance(norm, str) else Match(norm.op, norm)

    def install(self, module: nn.Module, proved: Match) -> None:
        swap_in(module, FastNorm)  # it is there where `undo` could not take our class away
        module.fastpeft_norm = proved.found

    def installed(self, module: nn.Module) -> Match | None:
        norm = module.fastpeft_norm if isinstance(module, FastNorm) else None
        return None if norm is None else Match(norm.op)

    def finish(self, root: nn.Module, modules: dict[str, nn.Module], setting: Any) -> None:
        pass

    def undo(self, module: nn.Module) -> bool:
        if not isinstance(module, FastNorm) or module.fastpeft_norm is None:
            return False
        module.leave()
        return True

    def status(self, module: nn.Module) -> tuple[str, str]:
        total, calls = outcomes(module)
        return "", "; ".join(f"{count} of {total} calls by its own forward: {why}" for why, count in calls.items())
