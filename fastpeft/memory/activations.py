"""Layers that keep for backward what their policy says, through the switch that transformers' own checkpointing reads.

A layer becomes one of these by a swap of `__class__`, under the name of its own, by which sharding libraries look for
it. Its two attributes of checkpointing then answer for the policy. What others write into them, such as a Trainer with
`gradient_checkpointing=True`, counts again when the policy is taken away; until then of it only the arguments of
torch's checkpoint are used, `use_reentrant` for one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastpeft_kernels.weights.held import holding

from ..integrations.transformers import is_cache
from ..layers.counting import Counting
from ..layers.mixing import reduced, swap_out
from .offloading import Place, parking
from .policy import LayerPolicy

CHECKPOINTED = ("recompute", "offload")


class PolicyLayer(nn.Module, Counting):
    """Mixed in before a layer's own class."""

    keeps_name = True
    fastpeft_mixture: type[PolicyLayer]
    fastpeft_memory: LayerPolicy | None = None
    fastpeft_place: Place
    fastpeft_decoded: int = 0  # bytes, of `MemoryPolicy.decoded`

    @property
    def gradient_checkpointing(self) -> bool:
        policy = self.fastpeft_memory
        if policy is None:
            return bool(self.__dict__.get("gradient_checkpointing", False))
        # Without gradients nothing is computed again, and transformers would take the cache of a generation away.
        return policy.activations in CHECKPOINTED and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.__dict__["gradient_checkpointing"] = value

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        if self.fastpeft_memory is None:
            given: Callable[..., Any] = self.__dict__.get("_gradient_checkpointing_func", checkpoint)
            return given
        return partial(run, self)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, value: Callable[..., Any]) -> None:
        self.__dict__["_gradient_checkpointing_func"] = value

    def leave(self) -> None:
        """This instance as it was before."""
        for name in ("fastpeft_memory", "fastpeft_place", "fastpeft_decoded", "fastpeft_calls"):
            self.__dict__.pop(name, None)
        swap_out(self, self.fastpeft_mixture)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self, self.fastpeft_mixture)


PolicyLayer.fastpeft_mixture = PolicyLayer


def run(layer: PolicyLayer, forward: Callable[..., Any], *args: Any) -> Any:
    """`forward(*args)`, of which backward computes again what it reads."""
    forward, args = without_cache(layer, forward, args)
    if layer.fastpeft_decoded and not torch.compiler.is_compiling():
        forward = keeping_decoded(forward, layer.fastpeft_decoded)
    asked = getattr(layer.__dict__.get("_gradient_checkpointing_func"), "keywords", {})
    again = partial(checkpoint, forward, *args, **{"use_reentrant": False} | asked)
    assert layer.fastpeft_memory is not None
    if layer.fastpeft_memory.activations == "offload":
        reason = why_not_offloaded(args)
        layer._count(reason or "fused")
        if reason is None:
            with parking(args[0], layer.fastpeft_place):
                return again()
    return again()


def keeping_decoded(forward: Callable[..., Any], room: int) -> Callable[..., Any]:
    """`forward`, of whose calls after the first, which backward makes, decoded weights wait for backward."""
    calls = count()

    def called(*args: Any) -> Any:
        with holding(room) if next(calls) else nullcontext():
            return forward(*args)

    return called


def without_cache(layer: Any, forward: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """A call that fills no key-value cache: running it again would fill it twice.

    transformers takes caches away that are passed by name; models take them away only where checkpointing is switched
    on for all of the model.
    """
    if getattr(layer, "_can_checkpoint_with_cache", False):  # such a layer only reads it
        return forward, args
    named = {name: None for name, value in forward.keywords.items() if is_cache(value)}
    return partial(forward, **named) if named else forward, tuple(None if is_cache(arg) else arg for arg in args)


def why_not_offloaded(args: tuple[Any, ...]) -> str | None:
    """Why a layer's input stays on the device, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile"
    if not args or type(args[0]) is not Tensor:
        return "its first argument is no tensor"
    return None
