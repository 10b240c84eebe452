"""One training step of a model without values: how much is alive, from layer to layer, forward and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft_kernels.common.scratch import release_scratch
from fastpeft_kernels.common.shapes import imitating

from .live import LiveBytes, rounded
from .repeated import Repeated
from .skeleton import stored


class Stretch(NamedTuple):
    """A part of the step.

    Attributes:
        phase: "begin" (before the first layer), "forward" (a layer), "loss" (what follows a layer, behind the last one
            the loss), "turn" (the loss's backward) or "backward" (a layer, and what lies before the first one).
        layer: of the layers, in the order of modules; -1 for none.
        peak: bytes at the most, above those at its beginning.
        change: bytes at its end less those at its beginning.
        gradients: of `change`, those of parameters' gradients that were not there.
        purposes: at the peak, (purpose, bytes) of `empty_for`.
    """

    phase: str
    layer: int
    peak: int
    change: int
    gradients: int = 0
    purposes: tuple[tuple[str, int], ...] = ()


def less(stretches: Sequence[Stretch], others: Sequence[Stretch]) -> list[Stretch]:
    """By how many bytes each of a step is more than the same one of another."""
    return [one._replace(peak=one.peak - two.peak, change=one.change - two.change, purposes=())
            for one, two in zip(stretches, others, strict=True)]  # fmt: skip


def more(stretches: Sequence[Stretch], others: Sequence[Stretch], times: int) -> list[Stretch]:
    """Each with so many times what `less` found."""
    return [one._replace(peak=one.peak + times * two.peak, change=one.change + times * two.change)
            for one, two in zip(stretches, others, strict=True)]  # fmt: skip


def trace(
    model: Any,
    layers: dict[str, nn.Module],
    batch: dict[str, Tensor],
    device: str,
    *,
    autocast: torch.dtype | None = None,
    accumulated: bool = True,
    repeated: Repeated | None = None,
    backward: bool = True,
    there: Sequence[str] = (),
) -> list[Stretch]:
    """The stretches of one step of forward and backward, in order of time.

    Args:
        model: on the meta device, accelerated, that has run once.
        layers: whose borders part the step.
        batch: what the model is called with, on the meta device.
        device: "cuda" or "cpu", whose way is taken.
        autocast: dtype of autocast; None for none.
        accumulated: gradients of an earlier batch are there already.
        repeated: of earlier traces.
        backward: false for a forward pass without gradients alone.
        there: names in the batch of what is counted as there already.
    """
    some = any(not each.is_meta for each in batch.values())
    live = LiveBytes(device, Repeated() if repeated is None else repeated, some)
    marks = _Marks(live, layers, [] if accumulated else [p for p in model.parameters() if p.requires_grad])
    live.add(tensor for _, tensor in stored(model))
    live.add(batch[name] for name in there if name in batch)
    release_scratch()
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if accumulated and parameter.requires_grad else None
    with imitating(device):
        with marks.set(), live:
            with torch.set_grad_enabled(backward), torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = model(**batch).loss
            if backward:
                marks.turn()
                loss.backward()
        release_scratch()
    model.zero_grad(set_to_none=True)
    return marks.stretches()


class _Marks:
    """Notes, at each border of a layer, what is alive and the peak since the last border."""

    def __init__(self, live: LiveBytes, layers: dict[str, nn.Module], trained: list[nn.Parameter]) -> None:
        self.live, self.layers, self.trained = live, list(layers.values()), trained
        self.marks: list[tuple[str, int, int, int, int, dict[str, int]]] = []
        self.forward = False

    @contextmanager
    def set(self) -> Iterator[None]:
        handles = []
        for index, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(self._enter(index), with_kwargs=True))
            handles.append(layer.register_forward_hook(self._leave(index)))
        self.forward = True
        self.live.restart()
        self._mark("begin", -1)
        try:
            yield
        finally:
            self._mark("end", -1)
            for handle in handles:
                handle.remove()

    def stretches(self) -> list[Stretch]:
        found = []
        for (phase, layer, alive, _, held, _), ends in zip(self.marks, self.marks[1:], strict=False):
            _, _, after, peak, then, purposes = ends
            found.append(Stretch(phase, layer, peak - alive, after - alive, then - held, tuple(purposes.items())))
        return found

    def _mark(self, phase: str, layer: int) -> None:
        held = sum(rounded(p.grad.nbytes, self.live.device) for p in self.trained if p.grad is not None)
        self.marks.append((phase, layer, self.live.live, self.live.peak, held, self.live.purposes))
        self.live.restart()

    def turn(self) -> None:
        """Forward is over."""
        if self.forward:
            self.forward = False
            self._mark("turn", -1)

    def _enter(self, index: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.forward:  # and not computed again in backward
                self._mark("forward", index)

        return enter

    def _leave(self, index: int) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not self.forward:
                return
            self._mark("loss", index)
            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: self._arrive(index))

        return leave

    def _arrive(self, index: int) -> None:
        self._mark("backward", index)
