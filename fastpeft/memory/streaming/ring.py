"""Which streamed layers have memory on the device: at most `count`, the next ones on their way while one computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..offloading import Line
from .host_store import Room
from .stowing import Bundle


class Ring:
    """Layers take turns in `count` places, in their order in forward and against it in backward.

    A layer that no place was prepared for gets one when it is asked for: another order costs time, not correctness. The
    place that was used longest ago is given up for it.

    Attributes:
        room: host memory that their weights may take.
        bundles: of all streamed layers, in the order of forward.
        peak: most bytes on the device at once.
        events: ("fill" | "use" | "empty", place of the layer), appended to while it is a list.
    """

    def __init__(self, count: int, host_memory: int | None = None) -> None:
        self.count, self.room = count, Room(host_memory)
        self.bundles: list[Bundle] = []
        self.filled: list[Bundle] = []
        self.peak = 0
        self.events: list[tuple[str, int]] | None = None
        self._lines: dict[torch.device, Line] = {}

    def use(self, bundle: Bundle) -> None:
        """The layer's values are there for what the device is told from now on, and the next layers' are under way."""
        if not bundle.stowed:
            return
        ahead = self._ahead(bundle, self.count)
        if bundle.stale and not bundle.written:
            self._empty(bundle)
        self._fill(bundle, (bundle,))
        bundle.wait(self._line(bundle))
        bundle.show()
        self.filled.remove(bundle)
        self.filled.append(bundle)
        self._note("use", bundle)
        for other in ahead:
            self._fill(other, (bundle, *ahead))
        for other in self._ahead(bundle, self.count + 1)[len(ahead) :]:
            other.expect()

    def open(self, bundle: Bundle) -> None:
        """The same for somebody who writes: what the layer then holds goes to the host."""
        self.use(bundle)
        bundle.written = True

    def empty(self, bundles: Iterable[Bundle] | None = None) -> None:
        """Give up the places of these, or of all."""
        for bundle in list(self.filled if bundles is None else bundles):
            if bundle in self.filled:
                self._empty(bundle)

    def keep(self, bundle: Bundle) -> None:
        """Take a layer out of the ring, its values on the device for good."""
        if bundle.stowed:
            self._fill(bundle, (bundle,))
            bundle.wait(self._line(bundle))
            self._line(bundle).finish()  # the host's memory may go now
            self.filled.remove(bundle)
        self.bundles.remove(bundle)

    def _ahead(self, bundle: Bundle, count: int) -> list[Bundle]:
        """Who comes next: the others of the `count` layers that begin with this one."""
        place, last = self.bundles.index(bundle), len(self.bundles)
        if torch._C._current_graph_task_id() != -1:  # within a backward pass
            places = range(place - 1, max(place - count, -1), -1)
        else:
            places = range(place + 1, min(place + count, last))
            if not torch.is_grad_enabled():  # the next token, or batch, begins at the first layer
                more = min(count - 1 - len(places), place)
                return [self.bundles[i] for i in (*places, *range(more))]
        return [self.bundles[i] for i in places]

    def _fill(self, bundle: Bundle, needed: tuple[Bundle, ...]) -> None:
        if bundle in self.filled or not bundle.stowed:
            return
        while len(self.filled) >= self.count:
            self._empty(next(other for other in self.filled if other not in needed))
        bundle.fill(self._line(bundle))
        self.filled.append(bundle)
        self.peak = max(self.peak, sum(other.nbytes for other in self.filled))
        self._note("fill", bundle)

    def _empty(self, bundle: Bundle) -> None:
        self.filled.remove(bundle)  # first: one that a signal leaves here counts as empty
        bundle.empty(self._line(bundle))
        self._note("empty", bundle)

    def _line(self, bundle: Bundle) -> Line:
        device: Any = bundle.device
        if device not in self._lines:
            self._lines[device] = Line(device)
        return self._lines[device]

    def _note(self, what: str, bundle: Bundle) -> None:
        if self.events is not None:
            self.events.append((what, self.bundles.index(bundle)))
