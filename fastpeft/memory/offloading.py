"""Tensors that wait for backward in host memory, and are on the device again when it reads them."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastpeft_kernels.common.shapes import imitated, weightless

logger = logging.getLogger("fastpeft")

LEAVING = 2
"""Tensors whose copies to the host may be under way while the device computes on."""

Place = tuple[int, int]
"""(number of a model, place of a layer in it); backward meets the places of one model in falling order."""


class Line:
    """The way between one device and the host: a stream of its own on a CUDA device, plain copies elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pins = self.side is not None
        self.leaving: deque[weakref.ref[Parked]] = deque()

    def host_memory(self, like: Tensor) -> Tensor:
        """Uninitialised, pinned where the device gains from it and the system has enough of it."""
        if (kind := imitated(self.device)) is not None:
            with weightless() if kind != "cpu" else nullcontext():
                return torch.empty_like(like)
        if self.pins:
            try:
                return torch.empty_like(like, device="cpu", pin_memory=True)
            except RuntimeError as error:
                self.pins = False
                logger.warning("offloaded layers go through pageable host memory, which is slower: %s", error)
        return torch.empty_like(like, device="cpu")

    def copy(self, into: Tensor, source: Tensor) -> Any:
        """Behind all that the device was told so far; returns what `wait` takes."""
        copied = self.copies([(into, source)])
        if self.side is not None and into.is_cuda:  # it may be dropped unread
            into.record_stream(self.side)
        return copied

    def copies(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Several copies, (into, source), as one; `into` lives until somebody has waited."""
        if self.side is None:
            for into, source in () if imitated(self.device) else pairs:
                into.copy_(source)
            return None
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            for into, source in pairs:
                into.copy_(source, non_blocking=self.pins)
            return self.side.record_event()

    def finish(self) -> None:
        """The host waits for all copies."""
        if self.side is not None:
            self.side.synchronize()

    def current(self) -> torch.cuda.Stream | None:
        """The stream that the device computes on at this point of the program."""
        return None if self.side is None else torch.cuda.current_stream(self.device)

    def wait(self, copied: Any) -> None:
        """What the device is told from now on comes after that copy; the host does not wait."""
        if copied is not None:
            torch.cuda.current_stream(self.device).wait_event(copied)

    def park(self, tensor: Tensor, place: Place) -> Parked:
        """Start a tensor's way to the host, and end that of the one LEAVING before it."""
        while len(self.leaving) >= LEAVING:
            parked = self.leaving.popleft()()
            if parked is not None:
                parked.let_go()
        before = self.leaving[-1]() if self.leaving else None
        parked = Parked(tensor, place, self, before)
        self.leaving.append(weakref.ref(parked))
        return parked


class Parked:
    """One tensor that is, or soon will be, in host memory only.

    Args:
        tensor: on the line's device; values, dtype and strides come back as they are.
        place: of the layer that reads it.
        before: the one that was parked before.
    """

    def __init__(self, tensor: Tensor, place: Place, line: Line, before: Parked | None) -> None:
        self.line, self.place = line, place
        same_pass = before is not None and before.place[0] == place[0] and before.place[1] <= place[1]
        self.before = weakref.ref(before) if before is not None and same_pass else None
        self.version: int | None = tensor._version  # None when `there` is a copy of ours
        self.there: Tensor | None = tensor.detach()  # shares the count of writes
        self.host = line.host_memory(tensor)
        self.copied = line.copy(self.host, self.there)
        self.written = False

    def let_go(self) -> None:
        """Drop what is on the device, once it is copied."""
        if self.there is not None:
            self.line.wait(self.copied)
            self.written |= self.version is not None and self.there._version != self.version
            self.there = None

    def fetch(self) -> None:
        """Start the way back, unless the tensor is on the device."""
        if self.there is None:
            self.there, self.version = torch.empty_like(self.host, device=self.line.device), None
            self.copied = self.line.copy(self.there, self.host)

    def back(self) -> Tensor:
        """The tensor, to be read now; the one before it, which backward reads next, sets out too.

        Raises:
            RuntimeError: it was written in place since it was parked.
        """
        self.fetch()
        before = self.before() if self.before is not None else None
        if before is not None:
            before.fetch()
        tensor = self.there
        assert tensor is not None
        self.let_go()
        if self.written:
            raise RuntimeError(
                "the input of an offloaded layer was written in place before backward had read it; "
                'keep what this layer needs: activations="keep"'
            )
        return tensor


_LINES: dict[torch.device, Line] = {}


@contextmanager
def parking(tensor: Tensor, place: Place) -> Iterator[None]:
    """What autograd saves of this very tensor waits in host memory; all else is saved as ever."""
    line = _LINES.get(tensor.device)
    if line is None:
        line = _LINES[tensor.device] = Line(tensor.device)
    wanted = _where(tensor)  # autograd keeps `pack` as long as what it packed: it may hold no tensor

    def pack(saved: Tensor) -> Tensor | Parked:
        return line.park(saved, place) if _where(saved) == wanted else saved

    def unpack(packed: Tensor | Parked) -> Tensor:
        return packed.back() if isinstance(packed, Parked) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _where(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    memory = tensor.untyped_storage()._cdata if tensor.is_meta else tensor.data_ptr()
    return memory, tensor.shape, tensor.stride()
