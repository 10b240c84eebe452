"""From one memory policy to the next that keeps less, in the middle of a training."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from torch import nn

from ...integrations.peft import hands_over_a_cache
from ...replacements.memory import MemoryReplacement, mlps
from ...replacements.mlp import RECOMPUTE
from ..activations import CHECKPOINTED
from ..layers import model_layers
from ..policy import ACTIVATIONS, Activations, LayerPolicy, MemoryPolicy
from ..streaming.layer import StreamedLayer


def current_policy(model: nn.Module) -> MemoryPolicy:
    """What a model's layers do at present, also where checkpointing was switched on by others."""
    layers = list(model_layers(model).values())
    streamed = [layer for layer in layers if isinstance(layer, StreamedLayer)]
    return MemoryPolicy(
        tuple(_policy(layer) for layer in layers),
        decoded=max((getattr(layer, "fastpeft_decoded", 0) for layer in layers), default=0),
        ring=streamed[0].fastpeft_ring.count if streamed else MemoryPolicy.ring,
    )


def next_policy(model: nn.Module) -> MemoryPolicy | None:
    """The same with the next way to keep less in every layer that keeps more; None where there is none.

    "selective" is passed over where no layer has an MLP that could compute gate and up again; with prefix tuning, whose
    cache no layer gets that is computed again, it is the last.
    """
    now = current_policy(model)
    layers = list(model_layers(model).values())
    policies = now.of(len(layers))
    barred = CHECKPOINTED if hands_over_a_cache(model) else ()
    for level in [level for level in ACTIVATIONS[1:] if level not in barred]:
        raised = tuple(
            replace(policy, activations=level) if _keeps_more(layer, policy, level) else policy
            for layer, policy in zip(layers, policies, strict=True)
        )
        if raised != policies:
            return replace(now, layers=raised)
    return None


def switch_policy(model: nn.Module, policy: MemoryPolicy, settings: dict[str, Any] | None) -> None:
    """Have a model's layers follow another policy from the next forward pass on; nothing else of them changes.

    Args:
        policy: one for each layer.
        settings: what `accelerate` noted of the model, brought up to date; None for a model that was not accelerated.
    """
    layers = model_layers(model)
    if settings is None or settings.get("mlp") != RECOMPUTE:
        for layer, before in zip(layers.values(), current_policy(model).of(len(layers)), strict=True):
            for mlp in mlps(layer) if before.activations == "selective" else ():
                mlp.fastpeft_keep = True
    MemoryReplacement().finish(model, layers, policy)
    if settings is not None:
        settings["memory"] = asdict(policy)


def level_text(policy: MemoryPolicy) -> str:
    """The ways of all layers, such as "recompute"."""
    layers = policy.layers if isinstance(policy.layers, tuple) else (policy.layers,)
    return ", ".join(sorted({layer.activations for layer in layers}, key=ACTIVATIONS.index))


def _policy(layer: Any) -> LayerPolicy:
    given: LayerPolicy | None = getattr(layer, "fastpeft_memory", None)
    return given or LayerPolicy("recompute" if layer.gradient_checkpointing else "keep")


def _keeps_more(layer: nn.Module, policy: LayerPolicy, level: Activations) -> bool:
    if ACTIVATIONS.index(policy.activations) >= ACTIVATIONS.index(level):
        return False
    return level != "selective" or any(mlp.fastpeft_keep for mlp in mlps(layer))
