"""The frozen weights of one layer, in host memory, and on the device for as long as it needs them.

A parameter stays the same object, with its shape, dtype and device; only its memory on the device is given back and
taken again (as FSDP does). So whatever kept the tensor for backward, autograd included, reads right values there.
Outside the layer's turn Python reads it by copies (`reading.py`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...integrations import bitsandbytes, peft
from ...layers.kept import stock_type
from ..offloading import Line
from .host_store import Room, pin, read_ahead, to_host
from .reading import HOME, hide, show

SMALLEST = 4096
"""Bytes below which a tensor stays on the device."""


@dataclass
class Stowed:
    """One tensor.

    Attributes:
        owner, name: where the layer holds it: a module's parameter, or an attribute of a quantisation state.
        tensor: what it holds there, with no memory on the device until `Bundle.fill`.
        host: the values.
        there: all bytes of the tensor's memory on the device; a view with a count of writes of its own.
        version: writes to `host` that the memory on the device has.
    """

    owner: Any
    name: str
    tensor: Tensor
    host: Tensor
    there: Tensor
    version: int = 0

    def is_current(self) -> bool:
        """Whether the layer still holds this tensor, over this memory."""
        now = getattr(self.owner, self.name, None)
        return now is self.tensor and now.untyped_storage()._cdata == self.there.untyped_storage()._cdata


class Bundle:
    """All of one layer that is streamed.

    Args:
        layer: its frozen matrices, and the scales of 4-bit ones, are moved to host memory at once.
        room: what host memory may be taken.
        elsewhere: storages that something outside the layer reads too; those stay.

    Attributes:
        filled: the device has the memory, and the values are there or on their way.
        left: why frozen matrices stay on the device, one for each: "shared", or the class of its storage.
        written: the values on the device may have changed; they go to the host when the layer gives up its place.
    """

    def __init__(self, layer: nn.Module, room: Room, elsewhere: frozenset[int] = frozenset()) -> None:
        self.layer, self.room, self.elsewhere = layer, room, elsewhere
        self.filled = self.written = self.filled_before = False
        self.copied: Any = None
        self.stream: Any = None
        self.stowed: list[Stowed] = []
        self.left: list[str] = []
        self.stow()

    @property
    def device(self) -> torch.device | None:
        return self.stowed[0].tensor.device if self.stowed else None

    @property
    def nbytes(self) -> int:
        """Bytes on the device while it is filled."""
        return sum(stowed.host.nbytes for stowed in self.stowed)

    @property
    def stale(self) -> bool:
        """Whether somebody wrote into the host's values since the device got them."""
        return self.filled and any([stowed.host._version != stowed.version for stowed in self.stowed])

    def show(self) -> None:
        """Python reads the device's memory from now on."""
        for stowed in self.stowed:
            show(stowed.tensor)

    def hide(self) -> None:
        """Python reads copies of the host's values from now on, unless those on the device are newer."""
        if not self.written:
            for stowed in self.stowed:
                hide(stowed.tensor, stowed.host, self.layer)  # type: ignore[arg-type]

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The tensors themselves for a while, to be asked for no values."""
        self.show()
        try:
            yield
        finally:
            self.hide()

    def stow(self) -> None:
        """Move what the layer holds now to the host. Its memory on the device is freed where nobody else has it."""
        known = {id(stowed.tensor): stowed for stowed in self.stowed if stowed.is_current()}
        self.stowed = []
        for owner, name, tensor in streamable(self.layer, self.elsewhere):
            stowed = known.get(id(tensor))
            if stowed is None:
                stowed = Stowed(owner, name, tensor, to_host(tensor, self.room), give_memory(tensor, tensor.device))
                if tensor.device.type == "cuda":
                    pin(stowed.host)
            else:
                stowed.host.copy_(tensor)
            stowed.there.untyped_storage().resize_(0)
            self.stowed.append(stowed)
            tensor.__dict__["__deepcopy__"] = partial(_copied, weakref.ref(self), weakref.ref(tensor))
        here = {id(stowed.tensor) for stowed in self.stowed}
        self.left = [
            "shared" if parameter.untyped_storage()._cdata in self.elsewhere else type(parameter).__name__
            for _, _, parameter in _matrices(self.layer)
            if id(parameter) not in here and parameter.nbytes >= SMALLEST
        ]
        for module in self.layer.modules():
            if bitsandbytes.is_linear_4bit(module):
                bitsandbytes.forget(module)
        self._free()

    def expect(self) -> None:
        """The layer's turn comes soon."""
        for stowed in self.stowed:
            read_ahead(stowed.host)

    def fill(self, line: Line) -> None:
        """Take memory on the device, all or none, and start the copies; `wait` before reading."""
        if line.side is not None and not self.filled_before:
            weakref.finalize(self, line.finish).atexit = False  # memory that is copied must not go meanwhile
            self.filled_before = True
        try:
            for stowed in self.stowed:
                stowed.there.untyped_storage().resize_(stowed.host.nbytes)
                stowed.version = stowed.host._version
        except RuntimeError:
            self._free()
            raise
        self.copied = line.copies([(s.there, s.host.view(-1).view(torch.uint8)) for s in self.stowed])
        self.stream, self.filled = line.current(), True

    def wait(self, line: Line) -> None:
        """What the device is told from now on finds the values."""
        line.wait(self.copied)
        stream = line.current()
        if stream is not None and stream != self.stream:
            for stowed in self.stowed:
                stowed.there.record_stream(stream)

    def empty(self, line: Line) -> None:
        """Give the memory back, behind all that the device was told so far; values that were written go to the host."""
        line.wait(self.copied)
        if self.written:
            self.stow()  # the host waits for what was written
        else:
            self._free()

    def forget(self) -> None:
        """Leave the tensors as they are now."""
        self.show()
        for stowed in self.stowed:
            stowed.tensor.__dict__.pop("__deepcopy__", None)

    def relocate(self, device: torch.device) -> None:
        """Empty tensors on another device in place of these; must not be filled."""
        self.show()
        for stowed in self.stowed:
            if device.type == "cuda":
                pin(stowed.host)
            stowed.there = give_memory(stowed.tensor, device)
        self._free()

    def _free(self) -> None:
        for stowed in self.stowed:
            stowed.there.untyped_storage().resize_(0)
        self.copied = self.stream = None
        self.filled = self.written = False
        self.hide()


def _copied(of: weakref.ref[Bundle], tensor_of: weakref.ref[Any], memo: dict[int, Any]) -> Tensor:
    """For `copy.deepcopy`, which reaches tensors by more ways than through their layer: one with its values."""
    tensor: Any = tensor_of()
    bundle = of()
    home = tensor.__dict__.get(HOME)
    newer = bundle is not None and bundle.written
    host = None if newer else home.host if home is not None else _host_of(bundle, tensor)
    value = (tensor.detach() if host is None else host).to(tensor.device, copy=True)
    kind = stock_type(tensor)
    if kind is Tensor:
        return value
    made: Any = Tensor._make_subclass(kind, value, tensor.requires_grad)
    if kind is not nn.Parameter:  # bitsandbytes'
        made.__dict__.update({k: v for k, v in tensor.__dict__.items() if k not in (HOME, "__deepcopy__")})
        made.quant_state = copy.deepcopy(tensor.quant_state, memo)
    return made  # type: ignore[no-any-return]


def _host_of(bundle: Bundle | None, tensor: Tensor) -> Tensor | None:
    """Its values in host memory while the layer is shown; None where the layer is gone, and the memory its own."""
    return None if bundle is None else next(each.host for each in bundle.stowed if each.tensor is tensor)


def give_memory(tensor: Tensor, device: torch.device) -> Tensor:
    """Put uninitialised memory of its own behind a tensor; returns all of it as bytes.

    The memory that the tensor had is not ours to free: a state dict or a mapped file may have it too.
    """
    there = torch.empty(tensor.nbytes, dtype=torch.uint8, device=device)
    fresh = torch.empty(0, dtype=tensor.dtype, device=device)
    tensor.data = fresh.set_(there.untyped_storage(), 0, tensor.shape, tensor.stride())  # type: ignore[call-overload]
    return there


def streamable(layer: nn.Module, elsewhere: frozenset[int]) -> Iterator[tuple[Any, str, Tensor]]:
    """(owner, name, tensor) of all that can be streamed: each frozen matrix of the base once, and 4-bit scales."""
    seen = set(elsewhere)
    for owner, name, tensor in _base_tensors(layer):
        storage = tensor.untyped_storage()._cdata
        whole = tensor.is_contiguous() and tensor.nbytes >= SMALLEST and not tensor.is_inference()
        if whole and tensor.device.type != "meta" and storage not in seen:
            seen.add(storage)
            yield owner, name, tensor


def _base_tensors(layer: nn.Module) -> Iterator[tuple[Any, str, Tensor]]:
    for module, name, parameter in _matrices(layer):
        state = getattr(parameter, "quant_state", None)
        if stock_type(parameter) is nn.Parameter or (state is not None and bitsandbytes.is_linear_4bit(module)):
            yield module, name, parameter
            if state is not None:
                yield state, "absmax", state.absmax


def _matrices(layer: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """The frozen ones of the base, and stacks of them."""
    for module in peft.base_modules(layer):
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad and parameter.dim() > 1:
                yield module, name, parameter


def shared_storages(model: nn.Module, layers: list[nn.Module]) -> frozenset[int]:
    """Storages that more than one of these layers, or anything outside them, reads."""
    places: dict[int, set[int]] = {}
    inside = {id(module): place for place, layer in enumerate(layers) for module in layer.modules()}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and stock_type(tensor) in (Tensor, nn.Parameter):
                found = places.setdefault(tensor.untyped_storage()._cdata, set())
                found.add(inside.get(id(module), -1))
    return frozenset(storage for storage, found in places.items() if len(found) > 1 or -1 in found)
