"""Which implementation an op takes: the one that was measured to be fastest here, else the op's analytic default.

Nothing is measured in a call. Choices are read once a process and device; a file that cannot be used is ignored, with
one warning. Candidates compute the same and keep the same for backward, so a choice changes rounding.

Backward runs in threads of its own, so the state is the process's, not a thread's. Who replaces it, to measure or to
find out what is asked for, holds a lock, which computing threads do not take.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..common.host import cpu_name
from . import files
from .records import UnusableError, Winner

logger = logging.getLogger("fastpeft")

Case = tuple[Any, ...]
"""A NamedTuple of strings, integers, switches and tuples of those: what decides which candidate is fastest."""

_known: dict[torch.device | int, dict[str, dict[Case, str]]] = {}  # of a CPU by the number of threads
_warned: set[str] = set()
_enabled = True
_forced: dict[str, str] = {}
_met: dict[tuple[str, Case], None] | None = None
_changes = 0  # of anything above
_lock = threading.RLock()


def choice(
    op: str,
    device: torch.device,
    case: Callable[[], Case],
    candidates: Callable[[torch.device], Sequence[str]],
    default: str,
) -> str:
    """The candidate to take. Must not be traced by torch.compile.

    Args:
        op: name of the choice.
        device: where the op computes.
        case: gives the case; called only where something was measured for this op and device.
        candidates: gives all candidates of a device; called when a measured choice is not the default.
        default: what to take where nothing was measured, and with `use_tuned(False)` or
            `torch.use_deterministic_algorithms(True)`.
    """
    if _met is not None:
        _met[op, case()] = None
    if op in _forced:
        return _forced[op]
    if not _enabled or torch.are_deterministic_algorithms_enabled():
        return default
    known = _choices(device).get(op)
    if not known:
        return default
    found = known.get(at := case(), default)
    if found != default and found not in candidates(device):
        _warn(f"no {op} of the name {found[:40]!r}", files.file_of(device_name(device), files.user_folder()))
        found = known[at] = default
    return found


def state() -> tuple[int, bool]:
    """Equal to an earlier one where every choice is the same as then."""
    return _changes, torch.are_deterministic_algorithms_enabled()


def gathers() -> bool:
    """Whether someone waits to see what is asked for."""
    return _met is not None


def _changed() -> None:
    global _changes
    _changes += 1


def use_tuned(enabled: bool) -> None:
    """Whether measured choices are used in this process; False leaves the analytic defaults.

    Those depend on shapes, dtypes and the kind of device only, so that two machines of a kind compute the same bits.

    Args:
        enabled: True, as a process begins, or False.
    """
    global _enabled
    _enabled = enabled
    _changed()


def device_name(device: torch.device) -> str:
    """The name under which choices are kept: of the GPU, or of the processor with torch's number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{cpu_name()}, {torch.get_num_threads()} threads"
    return device.type


def learn(device: torch.device, winner: Winner) -> None:
    """Use a winner in this process from now on."""
    _choices(device).setdefault(winner.op, {})[winner.case] = winner.choice
    _changed()


def measured(device: torch.device) -> list[tuple[str, Case, str]]:
    """(op, case, winner) of all that is in use for a device."""
    return [(op, case, name) for op, known in _choices(device).items() for case, name in known.items()]


@contextmanager
def measured_as(device: torch.device, winners: Iterable[tuple[str, Case, str]]) -> Iterator[None]:
    """These are in use meanwhile for a device, whatever its files have: what `measured` gave, perhaps elsewhere."""
    place, found = _place(device), dict[str, dict[Case, str]]()
    for op, case, name in winners:
        found.setdefault(op, {})[case] = name
    before = _known.get(place)
    _known[place] = found
    _changed()
    try:
        yield
    finally:
        _known.pop(place, None)
        if before is not None:
            _known[place] = before
        _changed()


def forget() -> None:
    """Read the files anew when next asked."""
    _known.clear()
    _warned.clear()
    _changed()


@contextmanager
def alone() -> Iterator[None]:
    """No other thread tunes, forces or gathers choices meanwhile; the same thread may.

    Raises:
        RuntimeError: another thread does.
    """
    if not _lock.acquire(blocking=False):
        raise RuntimeError("tune: another thread of this process is tuning; tune again when it is done")
    try:
        yield
    finally:
        _lock.release()


@contextmanager
def forced(choices: dict[str, str]) -> Iterator[None]:
    """These candidates by op, whatever was measured, in all threads; errors as `alone`."""
    global _forced
    with alone():
        before, _forced = _forced, choices
        _changed()
        try:
            yield
        finally:
            _forced = before
            _changed()


@contextmanager
def meeting() -> Iterator[dict[tuple[str, Case], None]]:
    """Gathers every (op, case) that any thread asks for meanwhile, as keys of a dict, in order; errors as `alone`."""
    global _met
    with alone():
        before, _met = _met, {}
        try:
            yield _met
        finally:
            _met = before


def with_index(device: torch.device) -> torch.device:
    """The device itself; "cuda" without an index as the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _place(device: torch.device) -> torch.device | int:
    return torch.get_num_threads() if device.type == "cpu" else with_index(device)


def _choices(device: torch.device) -> dict[str, dict[Case, str]]:
    place = _place(device)
    found = _known.get(place)
    if found is None:
        found = {}
        if device.type in ("cpu", "cuda"):
            name = device_name(device)
            for folder in (files.SHIPPED, files.user_folder()):  # the later wins
                for winner in _read(files.file_of(name, folder), name):
                    found.setdefault(winner.op, {})[winner.case] = winner.choice
        _known[place] = found
    return found


def _read(path: Path, device: str) -> list[Winner]:
    try:
        return files.read(path, device)
    except UnusableError as error:
        _warn(str(error), path)
        return []


def _warn(reason: str, path: Path) -> None:
    if str(path) not in _warned:
        _warned.add(str(path))
        logger.warning("measured choices in %s are not used: %s; fastpeft tune measures anew", path, reason)
