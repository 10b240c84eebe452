"""Who was called with the same tensor in one run of a model, and what follows from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from threading import get_ident
from typing import Any
from weakref import ref

from torch import Tensor, nn

from .frozen import can_join
from .siblings import version_of


class Seen:
    """The calls of adapted layers, and of the frozen projections beside them, while `record` is their pre-hook.

    Those by the thread that made it: another one's may be in the middle of a block.

    Attributes:
        adapted: layer -> its parent.
        frozen: projection without adapters -> its parent, where that is one adapted layer's parent.
    """

    def __init__(self, adapted: dict[Any, nn.Module]) -> None:
        children = [(child, parent) for parent in dict.fromkeys(adapted.values()) for child in parent.children()]
        times = Counter(child for child, _ in children)
        self.adapted = adapted
        self.frozen = {child: parent for child, parent in children if times[child] == 1 and can_join(child)}
        self._runs: dict[nn.Module, list[_Run]] = {}  # by parent
        self._thread = get_ident()

    def record(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor) or self._thread != get_ident():
            return
        parent = self.adapted[module] if module in self.adapted else self.frozen[module]
        runs = self._runs.setdefault(parent, [])
        for run in runs:
            if run.x() is args[0] and run.version == version_of(args[0]):
                run.members.append(module)
                return
        runs.append(_Run(args[0], module))

    def called(self) -> list[Any]:
        """The adapted layers that were."""
        return [m for runs in self._runs.values() for run in runs for m in run.members if m in self.adapted]

    def siblings(self) -> Iterator[tuple[nn.Module, list[Any]]]:
        """(parent, layers in calling order) that were the same each time any adapted one of them was called.

        Two or more, one of them adapted. Frozen ones that were not always with them, once, stay out; they never keep
        adapted ones from being siblings.
        """
        for parent, runs in self._runs.items():
            sets: dict[tuple[nn.Module, ...], list[_Run]] = {}
            places: dict[nn.Module, set[tuple[nn.Module, ...]]] = {}
            for run in runs:
                key = tuple(member for member in run.members if member in self.adapted)
                sets.setdefault(key, []).append(run)
                for member in key:
                    places.setdefault(member, set()).add(key)
            for key, alike in sets.items():
                if not key or len(set(key)) < len(key) or any(places[member] != {key} for member in key):
                    continue
                always = [m for m in alike[-1].members if all(run.members.count(m) == (run in alike) for run in runs)]
                if len(always) > 1:
                    yield parent, always


class _Run:
    """Layers of one parent that were called with the same tensor."""

    def __init__(self, x: Tensor, module: nn.Module) -> None:
        self.x, self.version, self.members = ref(x), version_of(x), [module]
