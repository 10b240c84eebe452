"""What is known of an error that says that memory ran out: how much was asked for, and what of a training met it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from ..plan.given import Given, given_of, is_rows
from ..sizes import UNITS

_ASKED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]i?B)")

Phase = Literal["training step", "forward pass without gradients", "optimizer step"]


class OutOfMemory(torch.OutOfMemoryError):
    """Memory ran out; the message says what is allocated, what was predicted, and what would need less.

    It begins with the original error's message; that error is its `__cause__`.

    Attributes:
        phase: what met it.
        asked: bytes that could not be had; None where the error does not say.
        changes: what would need less memory, a line each.
    """

    phase: Phase = "training step"
    asked: int | None = None
    changes: tuple[str, ...] = ()


def asked_bytes(error: BaseException) -> int | None:
    """What could not be had."""
    found = _ASKED.search(str(error))
    if found is None:
        return None
    return int(float(found[1]) * (1 if found[2] == "bytes" else UNITS[found[2].upper()]))


class Call(NamedTuple):
    """One call of a model.

    Attributes:
        rows, tokens: None where it got neither a matrix of token ids nor something to see or hear.
        trained: whether gradients were recorded.
        given: what it saw or heard.
    """

    rows: int | None
    tokens: int | None
    trained: bool
    given: Given | None = None


class LastCall:
    """A model's last call, `seen` by a hook for as long as this is entered."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, Call(None, None, True)

    def __enter__(self) -> LastCall:
        self._hook = self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hook.remove()

    def _note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if given := given_of(kwargs | {"input_ids": ids}):
            self.seen = Call(*given.size, torch.is_grad_enabled(), given)
        elif is_rows(ids):
            self.seen = Call(ids.shape[0], ids.shape[1], torch.is_grad_enabled())
        else:
            self.seen = Call(None, None, torch.is_grad_enabled())


def phase_of(error: BaseException, call: Call) -> Phase:
    """What of a training met an error."""
    if any(isinstance(frame.f_locals.get("self"), torch.optim.Optimizer) for frame in _frames(error)):
        return "optimizer step"
    return "training step" if call.trained else "forward pass without gradients"


def _frames(error: BaseException) -> Iterator[FrameType]:
    """From the call that failed inwards. Without the one that caught it: reading a running frame's variables would
    have it hold the error, and with it the tensors of all others."""
    step = error.__traceback__ and error.__traceback__.tb_next
    while step is not None:
        yield step.tb_frame
        step = step.tb_next
