"""PEFT's LoRA on an embedding -> the same layer with its update in one pass, by a swap of `__class__`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..integrations import peft
from ..integrations.accelerate import forward_is_its_class_s, has_hook_on_its_forward, rebind_hooked_forward
from ..layers.counting import outcomes
from ..layers.embedding import FastEmbedding, fast_embedding, stock_embedding
from .base import Left, Match

OP = "lora_embedding"


class EmbeddingReplacement:
    """LoRA over nn.Embedding and its subclasses, which are called as they are."""

    switch = "lora"

    def match(self, module: nn.Module) -> Match | Left | None:
        return Match(OP) if type(module) is stock_embedding() else None

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        if not peft.has_stock_forward(type(module)):
            return Left(f"{type(module).__name__}.forward was replaced by another library")
        if "forward" in module.__dict__ and not (forward_is_its_class_s(module) or has_hook_on_its_forward(module)):
            return Left("forward was replaced on the instance")
        return matched

    def install(self, module: nn.Module, proved: Match) -> None:
        stock, fast = type(module), fast_embedding()
        module.__class__ = fast
        rebind_hooked_forward(module, stock, fast)

    def installed(self, module: nn.Module) -> Match | None:
        return Match(OP) if isinstance(module, FastEmbedding) else None

    def finish(self, root: nn.Module, modules: dict[str, nn.Module], setting: Any) -> None:
        pass

    def undo(self, module: nn.Module) -> bool:
        if not isinstance(module, FastEmbedding):
            return False
        module.leave()
        fast, stock = type(module), stock_embedding()
        if fast is not fast_embedding():  # FSDP2 has put a class of its own before ours
            module.fastpeft_suspended = True
            return True
        module.__class__ = stock  # type: ignore[assignment]
        rebind_hooked_forward(module, fast, stock)
        return True

    def status(self, module: nn.Module) -> tuple[str, str]:
        total, calls = outcomes(module)
        return "", "; ".join(f"{count} of {total} calls by PEFT: {reason}" for reason, count in calls.items())
