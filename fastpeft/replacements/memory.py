"""Layers -> the same layers, each with a policy of what it keeps for backward."""

from __future__ import annotations

import logging
import sys
from itertools import count
from typing import Any

from torch import nn

from ..integrations.peft import hands_over_a_cache
from ..layers.fp8 import BOTH, FORWARD
from ..layers.mixing import swap_in
from ..layers.mlp import FastMlp
from ..memory.activations import CHECKPOINTED, PolicyLayer
from ..memory.layers import model_layers
from ..memory.policy import LayerPolicy, MemoryPolicy
from ..memory.sizes import gib
from ..memory.streaming.layer import StreamedLayer, stream_layers
from .base import Left, Match
from .swap import MixedIn

_MODELS = count()
logger = logging.getLogger("fastpeft")


def check_memory(model: nn.Module, memory: Any, fp8_compute: str | None = None) -> None:
    """Raises what `accelerate` says of its argument `memory`."""
    if memory is None:
        return
    if not isinstance(memory, (LayerPolicy, MemoryPolicy)):
        hint = ""
        if isinstance(memory, (str, int, float)):
            call = f"fastpeft.plan(model, gpu_memory={memory!r}, seq=..., batch=...)"
            hint = f"; what fits depends on the batch: memory={call}"
        got = type(memory).__name__
        raise TypeError(f"memory: expected a Plan, a MemoryPolicy, a LayerPolicy or None, got {got}{hint}")
    layers = model_layers(model)
    if not layers:
        raise ValueError(
            f"memory: expected a model with layers of transformers' GradientCheckpointingLayer, "
            f"got {type(model).__name__}, which has none"
        )
    chosen = whole(memory).of(len(layers))
    if (method := hands_over_a_cache(model)) and any(policy.activations in CHECKPOINTED for policy in chosen):
        raise ValueError(
            f'memory: expected activations "keep" or "selective" with {method}, whose keys and values come in a cache, '
            "which transformers takes away from layers that are computed again"
        )
    if any(policy.streamed for policy in chosen) and fp8_compute in (FORWARD, BOTH):
        raise ValueError(
            f"memory: expected no streamed layers with fp8_compute={fp8_compute!r}, "
            "whose copies of weights stay on the device"
        )


def carried_out(model: nn.Module, memory: Any) -> Any:
    """A plan's policy in place of the plan; anything else as it is. Raises ValueError for a plan of another model."""
    planning = sys.modules.get(f"{__package__.rpartition('.')[0]}.memory.plan.planning")
    if planning is None or not isinstance(memory, planning.Plan):
        return memory
    planned, here = memory.policy.layers, len(model_layers(model))
    if isinstance(planned, tuple) and len(planned) != here:
        raise ValueError(f"memory: expected a plan for {here} layers, got one for {len(planned)}, of {memory.model}")
    if not memory.fits:
        need, room = gib(memory.need.total), gib(memory.gpu_memory)
        logger.warning("the plan does not fit: %s are predicted on a GPU of %s", need, room)
    return memory.policy


def whole(memory: LayerPolicy | MemoryPolicy) -> MemoryPolicy:
    """The model's policy where that of all its layers may be given."""
    return MemoryPolicy(memory) if isinstance(memory, LayerPolicy) else memory


class MemoryReplacement(MixedIn):
    """All layers of a model at once, since a policy has their number: nothing is told from one module alone."""

    switch = "memory"
    mixture = PolicyLayer
    attribute = "fastpeft_memory"
    calls = "fastpeft_calls"
    other = "activations computed again from an input on the device"

    def op(self, found: LayerPolicy) -> str:
        tiles = f", MLP in tiles of {found.tile} tokens" if found.tile else ""
        return f"{found.activations}{tiles}{', streamed' if found.streamed else ''}"

    def match(self, module: nn.Module) -> Match | Left | None:
        return None

    def prove(self, module: nn.Module, matched: Match) -> Match | Left:
        return matched

    def finish(self, root: nn.Module, modules: dict[str, nn.Module], setting: Any) -> None:
        layers, number, memory = model_layers(root), next(_MODELS), whole(setting)
        chosen = memory.of(len(layers))
        streamed = [layer for layer, policy in zip(layers.values(), chosen, strict=True) if policy.streamed]
        stream_layers(root, streamed, memory.ring, memory.host_memory)
        for place, (layer, policy) in enumerate(zip(layers.values(), chosen, strict=True)):
            swap_in(layer, PolicyLayer)
            layer.fastpeft_memory, layer.fastpeft_place = policy, (number, place)  # type: ignore[assignment]
            layer.fastpeft_decoded = memory.decoded  # type: ignore[assignment]
            for mlp in mlps(layer):
                mlp.fastpeft_keep &= policy.activations != "selective"
                mlp.fastpeft_tile = policy.tile

    def undo(self, module: nn.Module) -> bool:
        undone = super().undo(module)
        if undone:
            for mlp in mlps(module):
                mlp.fastpeft_tile = 0
        return undone

    def status(self, module: nn.Module) -> tuple[str, str]:
        partners, note = super().status(module)
        return partners, "; ".join(filter(None, [_no_mlp(module), note, _left(module)]))


def _no_mlp(layer: nn.Module) -> str:
    """What of a policy is about MLPs, where there is none that is one op."""
    policy: LayerPolicy = layer.fastpeft_memory  # type: ignore[assignment]
    if mlps(layer):
        return ""
    if policy.activations == "selective":
        return "no MLP that is one op: nothing is computed again"
    return "no MLP that is one op: no tiles" if policy.tile else ""


def _left(layer: nn.Module) -> str:
    """What of a streamed layer stays on the device."""
    if not isinstance(layer, StreamedLayer):
        return ""
    left = layer.fastpeft_bundle.left
    if left:
        return f"{len(left)} frozen weights stay on the device: {', '.join(sorted(set(left)))}"
    return "" if layer.fastpeft_bundle.stowed else "no frozen weights that can be streamed"


def mlps(layer: nn.Module) -> list[FastMlp]:
    """Those of a layer that can compute gate and up again."""
    return [module for module in layer.modules() if isinstance(module, FastMlp) and module.fastpeft_roles is not None]
