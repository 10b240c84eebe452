"""Layers whose frozen weights wait in host memory and are copied to the device ahead of each use, both ways.

The first use is the layer's forward, which is within the part that checkpointing computes again; the second is told by
the gradient of what the layer returned, which autograd has before it runs anything of the layer.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from ...layers.kept import KEEPERS
from ...layers.mixing import swap_in
from ..activations import PolicyLayer
from .ring import Ring
from .stowing import Bundle, shared_storages


class StreamedLayer(PolicyLayer):
    """Mixed in before a layer's own class, in place of `PolicyLayer`."""

    fastpeft_ring: Ring
    fastpeft_bundle: Bundle

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dynamo = sys.modules.get("torch._dynamo")  # a compiled model stops before the layer, and goes on after it
        run: Callable[..., Any] = self._forward if dynamo is None else dynamo.disable(self._forward)
        return run(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        self.ask()
        try:
            y = super().forward(*args, **kwargs)
        finally:
            if torch._C._current_graph_task_id() == -1:  # else backward of this layer comes next
                self.fastpeft_bundle.hide()
        if torch.is_grad_enabled():
            for leaf in tree_leaves(y):
                if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                    leaf.register_hook(self._before_backward)
        return y

    def ask(self) -> None:
        """Have the weights on the device from here on.

        Raises:
            RuntimeError: one of them is trained now.
        """
        bundle = self.fastpeft_bundle
        if any([stowed.tensor.requires_grad for stowed in bundle.stowed]):
            raise RuntimeError(
                "a streamed base weight is trained now; what is trained must stay on the device: "
                "accelerate again without streaming this layer"
            )
        self.fastpeft_ring.use(bundle)

    def _before_backward(self, _: Tensor) -> None:
        self.ask()
        Variable._execution_engine.queue_callback(self.fastpeft_bundle.hide)

    def open(self) -> None:
        """The same for somebody who is about to write into them."""
        self.fastpeft_ring.open(self.fastpeft_bundle)

    def leave(self) -> None:
        stop(self)
        super().leave()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Streamed values are those in host memory."""
        bundle, ring = self.fastpeft_bundle, self.fastpeft_ring
        if bundle.written:
            ring.empty([bundle])
        with bundle.shown():
            found = super().state_dict(*args, **kwargs)
        if kwargs.get("keep_vars"):
            return found
        hosts = {stowed.there.untyped_storage()._cdata: stowed.host for stowed in bundle.stowed}
        for name, value in found.items():
            if isinstance(value, Tensor) and value.layout is torch.strided:
                found[name] = hosts.get(value.untyped_storage()._cdata, value)
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        streamed = {id(stowed.tensor) for stowed in self.fastpeft_bundle.stowed}
        names = {f"{prefix}{name}" for name, parameter in self.named_parameters() if id(parameter) in streamed}
        if not names.isdisjoint(state_dict):
            self.open()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        bundle, ring = self.fastpeft_bundle, self.fastpeft_ring
        if bundle.stowed and (device := _only_moves(fn, bundle)) is not None:
            if device != bundle.device:
                ring.empty([bundle])
                bundle.relocate(device)
            with bundle.shown():
                return super()._apply(fn, recurse)
        self.open()
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Streamed too, from host memory of its own, in turns with the other layers that are copied with it."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        own = {k: v for k, v in self.__dict__.items() if k not in ("fastpeft_ring", "fastpeft_bundle")}
        made.__dict__.update(copy.deepcopy(own, memo))
        old_ring = self.fastpeft_ring
        ring = memo.setdefault(id(old_ring), Ring(old_ring.count, old_ring.room.limit))
        both = zip(self.parameters(), made.parameters(), strict=True)
        elsewhere = self.fastpeft_bundle.elsewhere
        start(made, ring, frozenset(_storage(new) for old, new in both if _storage(old) in elsewhere))
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a streamed layer cannot be pickled, its weights are not all in one place; "
            "fastpeft.restore(model) first, or save the state dict"
        )


StreamedLayer.fastpeft_mixture = StreamedLayer


def stream_layers(model: nn.Module, layers: Sequence[nn.Module], count: int, host_memory: int | None) -> None:
    """Stream these layers of a model, and no others, with `count` places for all of them.

    Args:
        layers: in the order of forward. Each is a `PolicyLayer`, or of a class of the model's own.
        host_memory: as `MemoryPolicy` has it; layers that are streamed already stay where they are.
    """
    before = {id(layer): layer for layer in model.modules() if isinstance(layer, StreamedLayer)}
    chosen = {id(layer) for layer in layers}
    for key, old in before.items():
        if key not in chosen:
            old.leave()
    ring = next((old.fastpeft_ring for key, old in before.items() if key in chosen), None) or Ring(count)
    ring.empty()
    ring.count, ring.room.limit = count, host_memory
    fresh = [layer for layer in layers if id(layer) not in before]
    elsewhere = shared_storages(model, fresh)
    for layer in fresh:
        if isinstance(layer, PolicyLayer):
            layer.leave()
        swap_in(layer, StreamedLayer)
        start(layer, ring, elsewhere)
    ring.bundles = [layer.fastpeft_bundle for layer in layers]  # type: ignore[misc]


def check_resident(model: nn.Module) -> None:
    """Raises ValueError for a model with streamed layers, whose parts cannot be read one by one."""
    if any(isinstance(module, StreamedLayer) for module in model.modules()):
        raise ValueError(
            "model: expected layers on the device, got streamed ones; "
            "fastpeft.accelerate(model) without them first, with fewer layers if memory is short"
        )


def start(layer: Any, ring: Ring, elsewhere: frozenset[int]) -> None:
    """Move a layer's weights to the host, and let it take turns in a ring, as the last so far."""
    layer.fastpeft_ring, layer.fastpeft_bundle = ring, Bundle(layer, ring.room, elsewhere)
    ring.bundles.append(layer.fastpeft_bundle)
    for stowed in layer.fastpeft_bundle.stowed:
        if isinstance(stowed.owner, nn.Module):
            KEEPERS[stowed.owner] = weakref.ref(layer)


def stop(layer: StreamedLayer) -> None:
    """Have a layer's weights on the device for good."""
    ring, bundle = layer.fastpeft_ring, layer.fastpeft_bundle
    ring.keep(bundle)
    bundle.forget()
    for stowed in bundle.stowed:
        if isinstance(stowed.owner, nn.Module):
            KEEPERS.pop(stowed.owner, None)
    del layer.fastpeft_ring, layer.fastpeft_bundle


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _only_moves(fn: Callable[[Tensor], Tensor], bundle: Bundle) -> torch.device | None:
    """Where a function of `nn.Module._apply` moves tensors like a layer's; None where it does anything else to them."""
    device = None
    for dtype in {stowed.tensor.dtype for stowed in bundle.stowed}:
        probe = torch.empty(0, dtype=dtype, device=bundle.device)
        shared, moved = probe.is_shared(), fn(probe)
        if moved.dtype != dtype:
            return None
        if moved is probe and moved.is_shared() != shared:
            raise TypeError(
                "a streamed layer cannot be shared between processes, its weights are not all in one place; "
                "fastpeft.restore(model) first"
            )
        if moved.device == probe.device and (moved is not probe or probe._version):
            return None
        device = moved.device
    return device
