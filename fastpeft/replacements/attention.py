"""Attention modules of models on transformers' interface -> the same modules with our attention function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..integrations.transformers import (
    ATTENTION,
    asks_for_attention,
    attention_implementation,
    attention_is_an_argument,
    forget_weights,
    has_its_own_attention,
    is_model_class,
    makes_masks_of_masks,
    masks_by_name,
    set_attention_implementation,
)
from ..layers.counting import DENSE, outcomes
from ..layers.mixing import swap_in, swap_out, unmixed
from ..layers.relative_bias import MIXTURES, mixture_of, why_not_by_distance
from .base import Left, Match

OP = "attention"
SWITCHED = ("sdpa", "eager")
"""Implementations in whose place ours serves; others were asked for by name, and stay."""


@dataclass(frozen=True)
class Before:
    """What a module ran before, and, in whatever process it is unpickled, that ours is known there."""

    name: str

    def __reduce__(self) -> tuple[Any, ...]:
        return _before, (self.name,)


def _before(name: str) -> Before:
    from ..integrations.attention import register_attention

    register_attention()
    return Before(name)


class AttentionReplacement:
    """A change of the configuration, and of T5's attention class; a row of the report is one attention module."""

    switch = "attention"
    adapts = False

    def match(self, module: nn.Module) -> Match | Left | None:
        kind = unmixed(type(module))
        if is_model_class(kind) and has_its_own_attention(module):
            return Left("its class has attention of its own, which is not called through transformers' interface")
        name = attention_implementation(module)
        if name is None or not asks_for_attention(kind):
            return None
        if name not in (*SWITCHED, ATTENTION):
            return Left(f"attn_implementation={name!r} was asked for")
        if getattr(module.config, "output_attentions", False):
            return Left("output_attentions=True in its configuration, which only eager attention can do")
        if masks_by_name(kind):
            return Left("sparse attention, whose code masks keys for eager and sdpa alone")
        if makes_masks_of_masks(kind):
            return Left("it makes a mask of the model's, and asks for that with all queries x keys")
        if not attention_is_an_argument(kind) and why_not_by_distance(module) is not None:
            return Left("only its own eager attention is known to compute what it needs")
        return Match(OP, name)

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        return matched

    def install(self, module: nn.Module, proved: Match) -> None:
        from ..integrations.attention import register_attention

        register_attention()
        module.fastpeft_attention = Before(proved.found)  # type: ignore[assignment]
        module.__dict__.setdefault("fastpeft_calls", {})
        if why_not_by_distance(module) is None:
            swap_in(module, mixture_of(module))

    def installed(self, module: nn.Module) -> Match | None:
        served = "fastpeft_attention" in module.__dict__ and attention_implementation(module) == ATTENTION
        return Match(OP) if served and asks_for_attention(unmixed(type(module))) else None

    def finish(self, root: nn.Module, modules: dict[str, nn.Module], setting: Any) -> None:
        for module in modules.values():
            set_attention_implementation(module, ATTENTION)
        for model in root.modules():
            if is_model_class(type(model)) and attention_implementation(model) in SWITCHED and _all_ours(model):
                model.fastpeft_attention = Before(str(attention_implementation(model)))  # type: ignore[assignment]
                set_attention_implementation(model, ATTENTION)

    def undo(self, module: nn.Module) -> bool:
        before: Before | None = module.__dict__.pop("fastpeft_attention", None)
        if before is None:
            return False
        module.__dict__.pop("fastpeft_calls", None)
        forget_weights(module)
        if attention_implementation(module) == ATTENTION:
            set_attention_implementation(module, before.name)
        for mixture in MIXTURES:
            swap_out(module, mixture)
        return True

    def status(self, module: nn.Module) -> tuple[str, str]:
        total, calls = outcomes(module)
        dense = calls.pop(DENSE, 0)
        notes = [f"{count} of {total} calls by the model's own function: {reason}" for reason, count in calls.items()]
        notes += [f"{dense} of {total} calls over {DENSE}"] if dense else []
        if reason := why_not_by_distance(module):
            notes.append(reason)
        return "", "; ".join(notes)


def _all_ours(model: nn.Module) -> bool:
    """Whether every attention module within that asks for an implementation was given ours."""
    asking = [each for each in model.modules() if asks_for_attention(unmixed(type(each)))]
    return bool(asking) and all(attention_implementation(each) == ATTENTION for each in asking)
