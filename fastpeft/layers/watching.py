"""Which projections read the same tensor: found by watching one forward, fixed before the first with gradients.

`SiblingWatch` runs the outermost call once under no_grad and watches. No architecture's names are known here.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..integrations.transformers import passes_cache
from .siblings import SiblingGroup, version_of

if TYPE_CHECKING:
    from .lora import FastLoraLayer


class SiblingWatch:
    """Waits for the first call that reaches the given layers, runs it once under no_grad, and forms the groups.

    Every module above the layers carries a forward pre-hook of ours until its layers have been seen, so that it does
    not matter which of them is called from outside. A call that passes a cache is not run twice: watching is put off,
    and given up for those layers when the call computes gradients. A layer has one watch at a time, its attribute
    `fastpeft_watch`.
    """

    def __init__(self, root: nn.Module, layers: dict[str, FastLoraLayer]) -> None:
        self.parents: dict[int, nn.Module] = {}
        self.waiting: dict[int, FastLoraLayer] = {}
        self.hooks: list[tuple[nn.Module, RemovableHandle]] = []
        self._seen: dict[int, list[_Run]] | None = None
        self._failed: nn.Module | None = None
        above: dict[int, nn.Module] = {}
        for path, layer in layers.items():
            parent = root.get_submodule(path.rpartition(".")[0])
            if parent is layer:
                continue
            if layer.fastpeft_watch is not None:
                layer.fastpeft_watch.forget([layer])
            layer.fastpeft_watch = self
            self.waiting[id(layer)] = layer
            self.parents[id(layer)] = parent
            names = path.split(".")[:-1]
            for depth in range(len(names) + 1):
                module = root.get_submodule(".".join(names[:depth]))
                above[id(module)] = module
        for module in above.values():
            self.hooks.append((module, module.register_forward_pre_hook(self._before_forward, with_kwargs=True)))

    def forget(self, layers: list[Any]) -> None:
        """Wait no longer for these layers; without any left, be gone."""
        for layer in layers:
            if self.waiting.pop(id(layer), None) is not None:
                layer.__dict__.pop("fastpeft_watch", None)
        if not self.waiting:
            for _, hook in self.hooks:
                hook.remove()
            self.hooks.clear()

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._failed is module:  # a new call; an interrupt ended the last one
            self._failed = None
        busy = self._seen is not None or self._failed is not None
        if busy or torch.compiler.is_compiling() or getattr(module, "_is_replica", False):
            return
        inside = [layer for layer in module.modules() if id(layer) in self.waiting]
        if not inside:
            self._unhook(module)
            return
        if passes_cache(args, kwargs):
            if torch.is_grad_enabled():
                self.forget(inside)
            return
        try:
            self._watch(module, inside, args, kwargs)
        except Exception:  # most likely the real call meets the same error, and raises it where the user can see it
            self._failed = module
            if self._after_forward not in module._forward_hooks.values():
                self.hooks.append((module, module.register_forward_hook(self._after_forward, always_call=True)))
        else:
            self._unhook(module)

    def _watch(self, module: nn.Module, inside: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen = {}
        handles = [layer.register_forward_pre_hook(self._record) for layer in inside]
        try:
            with torch.no_grad(), _side_effects_undone(module):
                module.forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            seen, self._seen = self._seen, None
        for runs in seen.values():
            for members in _consistent(runs):
                SiblingGroup(self.parents[id(members[0])], members)
        self.forget([layer for runs in seen.values() for run in runs for layer in run.members])

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a watch that failed: watch again at the next call if the real one failed too, never if it succeeded."""
        if self._failed is not module:
            return
        self._failed = None
        if output is not None:
            self.forget([layer for layer in module.modules() if id(layer) in self.waiting])
            self._unhook(module)

    def _record(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self._seen is None or not args or not isinstance(args[0], Tensor):
            return
        runs = self._seen.setdefault(id(self.parents[id(layer)]), [])
        for run in runs:
            if run.x() is args[0] and run.version == version_of(args[0]):
                run.members.append(layer)  # type: ignore[arg-type]
                return
        runs.append(_Run(args[0], layer))  # type: ignore[arg-type]

    def _unhook(self, module: nn.Module) -> None:
        for known, hook in self.hooks:
            if known is module:
                hook.remove()
        self.hooks = [(known, hook) for known, hook in self.hooks if known is not module]

    def __getstate__(self) -> dict[str, Any]:
        return {
            "hooks": self.hooks,
            "layers": list(self.waiting.values()),
            "parents": [self.parents[key] for key in self.waiting],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.hooks, self._seen, self._failed = state["hooks"], None, None
        self.waiting = {id(layer): layer for layer in state["layers"]}
        self.parents = {id(layer): p for layer, p in zip(state["layers"], state["parents"], strict=True)}


class _Run:
    """Layers of one parent that were called with the same tensor."""

    def __init__(self, x: Tensor, layer: FastLoraLayer) -> None:
        self.x, self.version, self.members = ref(x), version_of(x), [layer]


def _consistent(runs: list[_Run]) -> list[list[FastLoraLayer]]:
    """The sets of two or more layers that were the same each time any of them was called."""
    sets: dict[tuple[int, ...], list[FastLoraLayer]] = {}
    places: dict[int, set[tuple[int, ...]]] = {}
    for run in runs:
        key = tuple(map(id, run.members))
        sets[key] = run.members
        for member in key:
            places.setdefault(member, set()).add(key)
    return [
        members
        for key, members in sets.items()
        if len(key) > 1 and len(set(key)) == len(key) and all(places[member] == {key} for member in key)
    ]


@contextmanager
def _side_effects_undone(module: nn.Module) -> Iterator[None]:
    """Random-number generators and running statistics as they were before."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    devices = {p.device for p in module.parameters() if p.is_cuda}
    python_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for buffer, value in buffers:
            buffer.copy_(value)
