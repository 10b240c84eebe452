"""Runs cases of ops: every peer's numbers first, then the times and the memory of those whose numbers nearly hold."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastpeft_kernels.common.budget import Deviation, OverBudgetError

from ..left_out import NotHereError, reason_of
from ..memory import MIB, peak_of_step
from ..records import Record
from ..timer import device_clock, interleaved
from . import ceilings
from .case import DIRECTIONS, Direction, Forward, Inputs, OpCase
from .checking import Truth, results, truth
from .turns import Turns, copies

OURS, REFERENCE, COMPILED = "fastpeft", "torch", "torch.compile"
NEARLY = 2.0
"""Budgets that a peer may use and still be timed; its records say so. Ours and PyTorch's may use one."""
ROUNDS = {"quick": 5, "default": 15, "full": 40}
Add = Callable[..., Record]


@dataclass
class Outcome:
    """What was measured so far.

    Attributes:
        records: in the order in which they were added.
        failures: what is wrong with fastpeft, or with a case itself; a peer's own faults are "left out" records.
    """

    records: list[Record] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass
class Fit:
    """A peer whose numbers hold, or nearly do."""

    forwards: list[tuple[Forward, Inputs]]
    deviation: Deviation

    def turns(self, direction: Direction) -> Turns:
        """Its work, as the timer calls it."""
        return Turns(self.forwards, direction)


class Runner:
    """Measures cases one after the other.

    Args:
        add: appends a record of the fields samples, settings, case, op, peer, metric, unit, error and budget, such as
            `Recorder.add`, and returns it.
        device: "cpu" or "cuda".
        depth: "quick", "default" or "full". A quick run leaves out "torch.compile", whose compiling takes longer than
            all else, unless `peers` names it.
        rounds: samples of each time; by default `ROUNDS` of the depth.
        peers: names of those that are measured; empty: all.
        say: is told of each case, and of each peer that is left out.
    """

    def __init__(
        self,
        add: Add,
        device: str,
        depth: str = "default",
        rounds: int | None = None,
        peers: Sequence[str] = (),
        say: Callable[[str], object] = print,
    ) -> None:
        self.outcome = Outcome()
        self._add_record, self._device, self._depth, self._peers, self._say = add, device, depth, peers, say
        self._rounds = rounds or ROUNDS[depth]
        self._rated: set[torch.dtype] = set()
        self.clock = device_clock(device)

    def run(self, cases: Iterable[OpCase]) -> Outcome:
        """Measure the machine's ceilings, once for each dtype, then every case; `outcome` grows meanwhile."""
        cases = list(cases)
        self._rate([dtype for dtype in dict.fromkeys(case.dtype for case in cases) if dtype not in self._rated])
        for case in cases:
            self._say(f"{case.op}: {case.name}, {_name(case.dtype)}")
            try:
                self._case(case)
            except torch.OutOfMemoryError as error:
                self._leave_out(case, REFERENCE, error)
            except Exception as error:
                self._fail(case, REFERENCE, error)
            finally:
                self._clean_up()
        return self.outcome

    def fitting(self, case: OpCase) -> dict[str, Fit]:
        """Every peer whose numbers nearly hold, and the reference a second time; the others are noted in `outcome`.

        Raises:
            Exception: whatever the reference raises.
        """
        inputs = [case.make(self._device, case.dtype, seed) for seed in range(copies(case, self._device))]
        found = self._checked(case, inputs, truth(case, inputs[0], self._device, 0))
        again = REFERENCE if REFERENCE in found else next(iter(found), None)
        return found if again is None else {**found, f"{again} again": found[again]}

    def _rate(self, dtypes: Sequence[torch.dtype]) -> None:
        if not dtypes:
            return
        for name, samples in ceilings.measure(self._device, dtypes, self._rounds, self.clock).items():
            unit = "GB/s" if name == ceilings.COPY else "TFLOP/s"
            self._add(op="ceiling", case=name, peer=REFERENCE, metric="rate", unit=unit, samples=samples, settings={})
        self._rated |= {*dtypes}

    def _case(self, case: OpCase) -> None:
        fit = self.fitting(case)
        for direction in (each for each in DIRECTIONS if each in case.floors and fit):
            turns = {name: peer.turns(direction) for name, peer in fit.items()}
            samples = interleaved(turns, self._rounds, device=self._device, clock=self.clock)
            floor = case.floors[direction]
            for name, each in turns.items():
                error, budget = fit[name].deviation
                common = {"op": case.op, "case": case.name, "peer": name, "error": error, "budget": budget}
                settings = self._settings(case, direction=direction)
                work = {"flops": floor.flops, "bytes": floor.bytes}
                self._add(**common, metric="time", unit="ms", samples=samples[name], settings=settings | work)
                if direction != "backward" and not name.endswith(" again"):
                    each.prepare()
                    peak = peak_of_step(each, self._device) / MIB
                    self._add(**common, metric="peak memory", unit="MiB", samples=peak, settings=settings)

    def _checked(self, case: OpCase, inputs: list[Inputs], true: Truth) -> dict[str, Fit]:
        found: dict[str, Fit] = {}
        for name, make in {**case.peers, REFERENCE: case.reference}.items():
            if self._peers and name not in self._peers:
                continue
            try:
                if name == COMPILED and self._depth == "quick" and name not in self._peers:
                    raise NotHereError("compiling takes longer than a quick run; --peer torch.compile measures it")
                forwards = [(make(each), each) for each in inputs]
                times = 1.0 if name.startswith(OURS) or name == REFERENCE else NEARLY
                found[name] = Fit(forwards, true.deviation(results(*forwards[0]), times))
                if (share := found[name].deviation.share) > 1.0:
                    self._say(f"    {name} over budget: {share:.2f}")
            except (NotHereError, torch.OutOfMemoryError) as error:
                self._leave_out(case, name, error)
            except Exception as error:
                if name.startswith(OURS):
                    self._fail(case, name, error)
                else:
                    self._leave_out(case, name, error)
        return found

    def _leave_out(self, case: OpCase, peer: str, error: Exception) -> None:
        reason = reason_of(error)
        self._say(f"    {peer} left out: {reason}")
        over = {}
        if isinstance(error, OverBudgetError):
            over = {"error": error.deviation.error, "budget": error.deviation.budget}
        settings = self._settings(case, reason=reason)
        common = {"op": case.op, "case": case.name, "peer": peer, **over}
        self._add(**common, metric="left out", unit="1", samples=1.0, settings=settings)

    def _fail(self, case: OpCase, peer: str, error: Exception) -> None:
        if not isinstance(error, OverBudgetError):
            self._say("".join(traceback.format_exception(error)))
        self._leave_out(case, peer, error)
        self.outcome.failures.append(f"{case.op}, {case.name}, {_name(case.dtype)}: {peer}: {reason_of(error)}")

    def _settings(self, case: OpCase, **more: Any) -> dict[str, Any]:
        threads = {"threads": torch.get_num_threads()} if self._device == "cpu" else {}
        return {**case.settings, "dtype": _name(case.dtype), **threads, **more}

    def _add(self, **fields: Any) -> None:
        self.outcome.records.append(self._add_record(**fields))

    def _clean_up(self) -> None:
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # a function is compiled for a few shapes only
        if self._device == "cuda":
            torch.cuda.empty_cache()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
