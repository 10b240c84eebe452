"""Language models -> the same models, whose heads give lazy logits to calls with labels."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from torch import nn

from ..integrations import bitsandbytes, quantised, trl
from ..integrations.accelerate import forward_is_its_class_s, has_hook_on_its_forward
from ..integrations.peft import saved_copies
from ..integrations.trainable_tokens import token_layers
from ..integrations.transformers import is_model_class, output_head, takes_labels
from ..layers.bypass import own_class
from ..layers.head import FastHead, make_head, unmake_head
from ..layers.head_call import FEW, LossCalls
from ..layers.log_probs import THEIRS, TrlHeads, log_probs
from ..layers.lora import FastLoraLayer
from ..layers.tokens import FastTokens
from .base import Left, Match

OP = "loss without logits"
CALLS = "fastpeft_loss"
LAZY = (FastLoraLayer, FastTokens, FastHead)
"""Classes of ours whose forward gives lazy logits."""


class LossReplacement:
    """A row of the report is a model of transformers with a head over words and a loss of its own.

    Models that have a head in common, as one around another, share what it learns.

    Its heads learn from hooks on the modules above them that labels came: libraries call a model through what is around
    it, PEFT's layers of wrapping by `forward`, past hooks.
    """

    switch = "loss"
    adapts = False

    def match(self, module: nn.Module) -> Match | Left | None:
        kind: Any = type(module)
        if not is_model_class(kind) or not takes_labels(kind):
            return None
        head = output_head(module)
        if head is None:
            return None
        heads = _called(head)
        reasons = [reason for each in heads if (reason := _why_not_a_head(each)) is not None]
        return Left(reasons[0]) if reasons else Match(OP, heads)

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        return matched

    def install(self, module: nn.Module, proved: Match) -> None:
        others = [each.__dict__[CALLS] for each in proved.found if CALLS in each.__dict__]
        calls = others[0] if others else LossCalls()
        module.__dict__[CALLS] = calls
        for head in proved.found:
            if not isinstance(head, LAZY):
                make_head(head)
            elif isinstance(base := head._modules.get("base_layer"), FastHead):  # it has got adapters since
                unmake_head(base)
            head.__dict__[CALLS] = calls

    def installed(self, module: nn.Module) -> Match | None:
        calls = module.__dict__.get(CALLS)
        if calls is None or not is_model_class(type(module)):
            return None
        head = output_head(module)
        heads = [] if head is None else _called(head)
        return Match(OP, heads) if heads and all(each.__dict__.get(CALLS) is calls for each in heads) else None

    def finish(self, root: nn.Module, modules: dict[str, nn.Module], setting: Any) -> None:
        for path, model in modules.items():
            calls = model.__dict__[CALLS]
            for above in accumulate(path.split("."), lambda outer, name: f"{outer}.{name}", initial=""):
                place = root.get_submodule(above.lstrip("."))
                if not _hooks(place, calls):
                    place.register_forward_pre_hook(calls.enter, with_kwargs=True)
                    place.register_forward_hook(calls.leave, with_kwargs=True, always_call=True)
                    place.register_forward_pre_hook(TrlHeads(calls).enter, with_kwargs=True)
            trl.bind(model, log_probs)

    def undo(self, module: nn.Module) -> bool:
        hooks = _hooks(module)
        for table, key in hooks:
            for name in TABLES:
                if name.startswith(table):
                    getattr(module, name).pop(key, None)
        if CALLS not in module.__dict__:
            return bool(hooks)
        module.__dict__.pop(CALLS)
        trl.unbind(module)
        unmake_head(module)
        return True

    def status(self, module: nn.Module) -> tuple[str, str]:
        found: LossCalls = module.__dict__[CALLS]
        calls = dict(found.outcomes)
        total, _ = sum(calls.values()), calls.pop("fused", 0)
        notes = [_note(why, count, total) for why, count in calls.items() if count]
        if found.compiled:
            notes.append("every call under torch.compile with logits, not counted")
        return "", "; ".join(notes)


def _note(why: str, count: int, total: int) -> str:
    reason = why.removeprefix(THEIRS)
    every = reason == FEW and count == total  # what is so in every call needs no count
    if reason != why and every:
        return f"every call by TRL's own function: {FEW}"
    if reason != why:
        return f"{count} of {total} calls by TRL's own function: {reason}"
    return f"every call with logits: {FEW}" if every else f"{count} of {total} calls with logits: {reason}"


TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def _hooks(module: nn.Module, calls: LossCalls | None = None) -> list[tuple[str, int]]:
    """(table, key) of our hooks on a module: those of `calls`, or all."""
    return [
        (table, key)
        for table in ("_forward_pre_hooks", "_forward_hooks")
        for key, hook in getattr(module, table).items()
        if (owner := _calls_of(getattr(hook, "__self__", None))) is not None and calls in (None, owner)
    ]


def _calls_of(owner: Any) -> LossCalls | None:
    if isinstance(owner, TrlHeads):
        return owner.calls
    return owner if isinstance(owner, LossCalls) else None


def _called(head: nn.Module) -> list[nn.Module]:
    """What PEFT calls in the head's place, or the head."""
    return saved_copies(head) or token_layers(head) or [head]


def _why_not_a_head(head: nn.Module) -> str | None:
    """Why a module that gives logits cannot be asked for hidden states instead."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    name = type(head).__name__
    if isinstance(head, LAZY):
        return None
    if isinstance(head, BaseTunerLayer):
        return f"a head of type {name}, which is not accelerated itself"
    dense = type(head) is nn.Linear or bitsandbytes.is_linear_4bit(head)
    if (not dense and quantised.reader(head) is None) or own_class(head) is not type(head):
        return f"a head of type {name}"
    if "forward" in head.__dict__ and not (forward_is_its_class_s(head) or has_hook_on_its_forward(head)):
        return f"a head of type {name} whose forward was replaced on the instance"
    return None
