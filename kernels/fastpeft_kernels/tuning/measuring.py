"""One case of an op on this device: every candidate checked against fp64, then timed beside the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from .clock import faster, interleaved_us
from .records import Winner

SECONDS = 1.0
"""How long a case is timed, about."""


class Key(Protocol):
    """A case of an op: a NamedTuple of plain values."""

    def at(self, tokens: int, device: torch.device) -> Key:
        """The case for so many tokens on a device; itself where it knows of neither."""

    def smaller(self) -> Key:
        """A case that stands for it where it is held against fp64; itself where fp64 costs little."""

    def _asdict(self) -> dict[str, Any]: ...


class Problem(Protocol):
    """A case on random numbers."""

    def run(self, candidate: str) -> Sequence[Tensor]:
        """What the candidate computes; the tensors may be written over by the next run."""

    def exact(self) -> Sequence[Tensor]:
        """The same in fp64."""


@dataclass(frozen=True)
class Tunable:
    """An op with a choice.

    Attributes:
        op: name of the choice.
        key: makes a case from its fields.
        candidates: by name, for a device; first the plain library, which wins where no other is faster.
        problem: makes a case on random numbers.
    """

    op: str
    key: Callable[..., Key]
    candidates: Callable[[torch.device], Sequence[str]]
    problem: Callable[[Any, torch.device], Problem]


@dataclass(frozen=True)
class Measured:
    """The outcome of one case.

    Attributes:
        op, key: the case.
        winner: None where nothing could be measured.
        library: name of the candidate that is the plain library.
        dropped: why candidates were not timed, by name; the library's reason stands for all that have none.
        reused: whether it was measured earlier.
    """

    op: str
    key: Key
    winner: Winner | None
    library: str
    dropped: dict[str, str] = field(default_factory=dict)
    reused: bool = False


def measure(tunable: Tunable, key: Key, device: torch.device, seconds: float = SECONDS) -> Measured:
    """Find the fastest candidate of a case whose results are right.

    The library stays unless another is faster by more than the noise; see `clock.faster`. A candidate is dropped that
    raises, or whose error against fp64, on the key's smaller case, is over twice the library's and one rounding. Where
    the library itself fails, for want of memory say, or anything while it is timed, there is no winner.

    Autocast and modes of the caller do not count, and the generators that are used are afterwards as they were.
    """
    library = tunable.candidates(device)[0]
    dropped: dict[str, str] = {}
    try:
        with _undisturbed(device):
            times = _times(tunable, key, device, seconds, dropped)
    except Exception as error:  # also what a GPU reports late
        return Measured(tunable.op, key, None, library, {**dropped, library: _reason(error)})
    us = {name: round(median(samples), 2) for name, samples in times.items()}
    fastest = min(us, key=us.__getitem__)
    chosen = fastest if fastest != library and faster(times[fastest], times[library]) else library
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in key._asdict().items()}
    return Measured(tunable.op, key, Winner(tunable.op, fields, chosen, us), library, dropped)


def _times(
    tunable: Tunable, key: Key, device: torch.device, seconds: float, dropped: dict[str, str]
) -> dict[str, list[float]]:
    """Microseconds of the library and of every candidate that is right; of the others, why, into `dropped`."""
    library, *others = tunable.candidates(device)
    checked, problem = tunable.problem(key.smaller(), device), tunable.problem(key, device)
    exact = checked.exact()
    errors = _errors(checked.run(library), exact)
    problem.run(library)
    sound = [library]
    for name in others:
        try:
            wrong = _over_budget(checked.run(name), exact, errors)
            problem.run(name)
        except Exception as error:
            wrong = _reason(error)
        if wrong:
            dropped[name] = wrong
        else:
            sound.append(name)
    del exact, checked
    return interleaved_us({name: partial(problem.run, name) for name in sound}, device, seconds)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Random numbers that are always the same, gradients, no autocast, and the device is torch's current one."""
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed other devices too, which nobody restores
        if device.type == "cuda":
            torch.cuda.manual_seed(0)
        yield


def _errors(results: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    return [_largest(y.double() - y64) for y, y64 in zip(results, exact, strict=True)]


def _over_budget(results: Sequence[Tensor], exact: Sequence[Tensor], library: list[float]) -> str:
    """What is wrong with a candidate's results; "" where nothing is."""
    for i, (y, y64, theirs) in enumerate(zip(results, exact, library, strict=True)):
        error = _largest(y.double() - y64)
        budget = 2.0 * theirs + torch.finfo(y.dtype).eps * _largest(y64)
        if not error <= budget:  # also for NaN
            return f"wrong: result {i} errs by {error:.2e}, the budget is {budget:.2e}"
    return ""


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def _reason(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
