"""What a step of training changes beside its result, as it was before: gradients, random numbers, buffers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...layers.buffers import BufferOwners, BufferValue
from ...layers.random_state import RandomState, devices_of
from ..offloading import Line

SMALL = 1 << 16
"""Bytes of a buffer of which a copy is kept; of larger ones it is looked whether they were written to."""


class _Gradient(NamedTuple):
    parameter: Tensor
    gradient: Tensor | None
    copy: Tensor | None


class StateBefore:
    """Of one model, noted before each step.

    Gradients are copied to the host, into the same memory each time: a second copy on the device would be what is
    short. Adding a step's gradients to the others only at its end would need none, but as much on the device, and
    rounds otherwise where a parameter gets its gradient in parts (reentrant checkpointing).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._hosts: dict[int, Tensor] = {}
        self._lines: dict[torch.device, Line] = {}
        self._random = RandomState(())
        self._trained: list[tuple[Tensor, int]] = []
        self._gradients: list[_Gradient] = []
        self._small: list[BufferValue] = []
        self._large: list[tuple[Tensor, int]] = []
        self._owners = BufferOwners(())

    def note(self) -> None:
        """The state as it is now is the one to go back to."""
        self._random = RandomState(devices_of(self.model))
        self._trained = [(p, p._version) for p in self.model.parameters() if p.requires_grad]
        with torch.no_grad():
            self._gradients = [_Gradient(p, p.grad, self._copy(p, p.grad)) for p, _ in self._trained]
            self._owners = BufferOwners(module for module in self.model.modules() if module._buffers)
            found = {id(b): b for b in self.model.buffers() if not (b.is_inference() or b.is_meta)}
            buffers = list(found.values())
            self._small = [BufferValue(b) for b in buffers if b.nbytes <= SMALL]
            self._large = [(b, b._version) for b in buffers if b.nbytes > SMALL]

    def forget(self) -> None:
        """Hold no gradients or buffers any more; what gradients were copied into stays for the next time."""
        for noted in (self._trained, self._gradients, self._small, self._large):
            noted.clear()
        self._owners = BufferOwners(())

    def put_back(self) -> None:
        """The state that was noted."""
        with torch.no_grad():
            for parameter, gradient, copied in self._gradients:
                if gradient is not None and copied is not None:
                    gradient.copy_(copied)
                parameter.grad = gradient
            self._owners.put_back({id(value.buffer) for value in self._small if value.put_back()})
        self._random.put_back()

    def why_lost(self) -> str | None:
        """Why the state cannot be had back, where something was changed of which no copy is kept."""
        if any(parameter._version != version for parameter, version in self._trained):
            return "trained parameters were changed in the step"
        if any(buffer._version != version for buffer, version in self._large):
            return "a large buffer of the model was written to in the step"
        return None

    def _copy(self, parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        if gradient.layout is not torch.strided or gradient.device.type == "meta":
            return gradient.clone()
        host = self._hosts.get(id(parameter))
        if host is None or host.shape != gradient.shape or host.dtype != gradient.dtype:
            line = self._lines.setdefault(gradient.device, Line(gradient.device))
            host = self._hosts[id(parameter)] = line.host_memory(gradient)
        # Behind what the device was told so far, and before the backward that adds to the gradient.
        return host.copy_(gradient, non_blocking=host.is_pinned())
