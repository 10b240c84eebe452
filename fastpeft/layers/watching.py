"""Which projections read the same tensor: found by watching one forward, fixed before the first with gradients.

A `SiblingWatch` runs the outermost call once under no_grad and watches. No architecture's names are known here.

Hooks and what they know refer to modules below them only, so that a copy of a part of a model takes that part along
and nothing else.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import dropwhile
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn

from fastpeft_kernels.common.exhaustion import is_out_of_memory

from ..integrations.bitsandbytes import cpu_packing_forbidden
from ..integrations.models import is_around
from ..integrations.peft import has_stateful_variant
from ..integrations.transformers import passes_cache
from .buffers import BufferOwners, BufferValue
from .counting import uncounted
from .frozen import join
from .random_state import RandomState, devices_of
from .seen import Seen
from .siblings import SiblingGroup

if TYPE_CHECKING:
    from .lora import FastLoraLayer

logger = logging.getLogger("fastpeft")


def watch(root: nn.Module, layers: dict[str, FastLoraLayer]) -> None:
    """Wait for the first call of these layers, by path: a `SiblingWatch` for each outermost module above some.

    That is a model, or above a layer in none, what holds no model. What holds models is not run twice: the forward of a
    trainer's or a sentence encoder's module may keep what it computed, and would then have it twice.
    """

    @cache
    def holds_models(path: str) -> bool:
        return is_around(root.get_submodule(path))

    outermost: dict[str, dict[FastLoraLayer, list[str]]] = {}
    for path, layer in layers.items():
        if layer.fastpeft_watch is not None:
            layer.fastpeft_watch.forget([layer])
        layer.__dict__.pop("fastpeft_watch_error", None)
        names = path.split(".")[:-1]
        above = [".".join(names[:depth]) for depth in range(len(names) + 1)] if path else []
        places = list(dropwhile(holds_models, above))
        if places:
            outermost.setdefault(places[0], {})[layer] = places
        elif above:
            parent = type(root.get_submodule(above[-1])).__name__
            layer.__dict__["fastpeft_watch_error"] = f"{parent} has it beside a model, and is not run twice"
    for waiting in outermost.values():
        SiblingWatch().start(root, waiting)


class SiblingWatch:
    """Waits for the first call that reaches its layers, runs it once under no_grad, and forms the groups.

    A call that passes a cache, or runs a LoRA variant that keeps a state, is not run twice: watching is put off, and
    given up for those layers when the call computes gradients. A layer has one watch at a time, its attribute
    `fastpeft_watch`; where watching failed and the call itself did not, the attribute `fastpeft_watch_error` says why.
    """

    def __init__(self) -> None:
        self._places: WeakSet[_Place] = WeakSet()
        self._outer: _Place | None = None  # being watched, or in the call that follows: calls inside are left alone
        self._thread = 0  # of that call; calls by others meanwhile are not looked at
        self._beginning = Lock()
        self._ran: dict[_Place, nn.Module] = {}  # called meanwhile
        self._seen: Seen | None = None  # while watching
        self._error: str | None = None  # of watching `_outer`

    def start(self, root: nn.Module, layers: dict[FastLoraLayer, list[str]]) -> None:
        """Wait for these layers below modules at these paths, the parent's last: any may be called from outside."""
        below: dict[str, dict[FastLoraLayer, nn.Module]] = {}
        for layer, places in layers.items():
            layer.fastpeft_watch = self
            for at in places:
                below.setdefault(at, {})[layer] = root.get_submodule(places[-1])
        for path, waiting in below.items():
            _Place(self, root.get_submodule(path), waiting)

    @property
    def watching(self) -> bool:
        """Whether the run that is watched goes on just now, in this thread."""
        return self._seen is not None and self._thread == get_ident()

    def add(self, place: _Place) -> None:
        self._places.add(place)

    def forget(self, layers: list[Any]) -> None:
        """Wait no longer for these layers; without any left below a module, be gone from there."""
        for place in list(self._places):
            for layer in layers:
                place.waiting.pop(layer, None)
            if not place.waiting:
                place.unhook()
        for layer in layers:
            layer.__dict__.pop("fastpeft_watch", None)

    def before(self, place: _Place, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A place is called. Costs next to nothing while a cache is passed, as for every token that is generated."""
        mine = self._thread == get_ident()
        if mine and self._outer is place and self._seen is None:  # a new call; an interrupt ended the last one
            self._outer = None
        if self._outer is not None:
            if mine:
                self._ran[place] = module
        elif passes_cache(args, kwargs) or (place.waiting and has_stateful_variant(module)):
            if torch.is_grad_enabled():
                self.forget(list(place.waiting))
        elif place.waiting:
            with self._beginning:
                if self._outer is not None:
                    return
                self._outer, self._thread, self._ran, self._error = place, get_ident(), {}, None
            try:
                self._watch(place, module, args, kwargs)
            except Exception as error:
                if is_out_of_memory(error):  # a run without gradients takes less than the one that is to follow
                    self._outer = None
                    raise
                # most likely the real call meets it too, and raises it where the user sees it
                self._error = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            except BaseException:
                self._outer = None
                raise
            if place.waiting:
                place.await_end(module)
            else:
                self._outer = None
        else:  # the layers are no more
            place.unhook()

    def after(self, place: _Place, module: nn.Module, output: Any) -> None:
        """The call that was watched has ended. Whatever ran in it has had its chance, unless it failed both times."""
        if self._outer is not place or self._thread != get_ident():
            return
        self._outer, ran, self._ran = None, self._ran, {}
        failed = output is None and sys.exc_info()[1] is not None
        if failed and self._error is not None:
            return
        if self._error is not None:
            layers: list[Any] = list(place.waiting)
            for layer in layers:
                layer.fastpeft_watch_error = self._error
            logger.warning(
                "%d LoRA layers are computed one by one: running %s once under no_grad, to see which of them read the "
                "same tensor, failed with %s",
                *(len(layers), type(module).__name__, self._error),
            )
            self.forget(layers)
            return
        if not failed:  # else torch goes through this module's hooks just now
            ran[place] = module
        unreached = {layer: parent for one in ran for layer, parent in one.living()}
        for one in ran:
            one.waiting.clear()
        parents = set(ran.values())
        waiting = {layer for one in self._places for layer in one.waiting}
        self.forget([layer for layer, parent in unreached.items() if parent in parents or layer not in waiting])

    def _watch(self, place: _Place, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen = seen = Seen(dict(place.living()))
        handles = [each.register_forward_pre_hook(seen.record) for each in (*seen.adapted, *seen.frozen)]
        forward = getattr(module, "_orig_mod", module.forward)  # a compiled one's would be compiled with these hooks
        try:
            with torch.no_grad(), cpu_packing_forbidden(seen.frozen), side_effects_undone(module):
                forward(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            self._seen = None
        for parent, members in seen.siblings():
            SiblingGroup().form(parent, [join(m) if m in seen.frozen else m for m in members])
        self.forget(seen.called())

    def __reduce__(self) -> Any:
        """A copy knows nothing, until the places that are copied with it report to it."""
        return SiblingWatch, ()


class _Place:
    """A module above layers that are waited for, held by its hooks on that module.

    Attributes:
        waiting: layer -> its parent; both are held by the model alone.
    """

    def __init__(self, watch: SiblingWatch, module: nn.Module, waiting: dict[FastLoraLayer, nn.Module]) -> None:
        self.watch, self.waiting = watch, WeakKeyDictionary({layer: ref(parent) for layer, parent in waiting.items()})
        self.hooks = [module.register_forward_pre_hook(self._before, with_kwargs=True)]
        watch.add(self)

    def living(self) -> list[tuple[FastLoraLayer, nn.Module]]:
        found = [(layer, parent()) for layer, parent in self.waiting.items()]
        return [(layer, parent) for layer, parent in found if parent is not None]

    def await_end(self, module: nn.Module) -> None:
        if len(self.hooks) == 1:
            self.hooks.append(module.register_forward_hook(self._after, always_call=True))

    def unhook(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling() and "_is_replica" not in module.__dict__:
            self.watch.before(self, module, args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling() and "_is_replica" not in module.__dict__:
            self.watch.after(self, module, output)

    def __getstate__(self) -> dict[str, Any]:
        return {"watch": self.watch, "hooks": self.hooks, "waiting": self.living()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.watch, self.hooks = state["watch"], state["hooks"]
        self.waiting = WeakKeyDictionary({layer: ref(parent) for layer, parent in state["waiting"]})
        self.watch.add(self)


@contextmanager
def side_effects_undone(module: nn.Module) -> Iterator[None]:
    """As before: random-number generators, buffers, attributes of modules whose buffers changed, counts of calls."""
    owners = BufferOwners(module.modules())
    values = {id(b): BufferValue(b) for b in module.buffers() if b.layout is torch.strided and not b.is_meta}
    generators = RandomState(devices_of(module))
    try:
        with uncounted(module):
            yield
    finally:
        generators.put_back()
        # Copies of trained weights that autocast made under no_grad would keep them from their gradients.
        torch.clear_autocast_cache()
        owners.put_back({key for key, value in values.items() if value.put_back()})
