"""What modules hold in their buffers, and what their attributes say of it, at one moment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .siblings import version_of


class BufferOwners:
    """Which buffers modules have, and their other attributes.

    Attributes, because they often say what a buffer holds: rotary embeddings note for which length they were extended.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._noted = [(module, dict(module.__dict__), dict(module._buffers)) for module in modules]

    def put_back(self, written: set[int]) -> None:
        """The buffers themselves, and the attributes of modules of which one was replaced or written to.

        Args:
            written: ids of buffers whose values had changed. Our own attributes stay as they are.
        """
        for module, attributes, buffers in self._noted:
            replaced = list(map(id, module._buffers.values())) != list(map(id, buffers.values()))
            if replaced:
                module._buffers.clear()
                module._buffers.update(buffers)
            if replaced or not written.isdisjoint(map(id, buffers.values())):
                for name in filter(_is_theirs, module.__dict__.keys() - attributes.keys()):
                    del module.__dict__[name]
                module.__dict__.update({name: value for name, value in attributes.items() if _is_theirs(name)})


def _is_theirs(name: str) -> bool:
    return not name.startswith("fastpeft_")


class BufferValue:
    """What a buffer holds at present; `put_back` has it hold that again."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.data, self.value, self.version = buffer, buffer.data, buffer.clone(), version_of(buffer)
        # Fake tensors have no values to compare.
        self.plain = type(buffer) is type(self.value) is Tensor

    def put_back(self) -> bool:
        """True when there was something to put back; versions do not count what was written through `.data`."""
        buffer = self.buffer
        moved = self.plain and _place_of(buffer) != _place_of(self.data)
        if moved:
            buffer.data = self.data
        written = version_of(buffer) != self.version or (self.plain and not torch.equal(buffer, self.value))
        if written:
            buffer.data.copy_(self.value)
        return moved or written


def _place_of(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device
