"""All peers of a case in order, each in its own process; what was measured is kept as soon as it is whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from .case import FinetuneCase
from .keeping import Add, keep, keep_ceilings, keep_steps
from .peers import EXACT, PEFT, Peer, why_not
from .processes import LeftOutError, Make, Worker
from .result import Result, disagreement
from .worker import CEILINGS, GO, READY, RUN, SOURCE, STEPS, Outcome, Task, make_source, train

_SHARED = ("torch", "transformers.trainer", "peft", "trl.trainer.sft_trainer")


@dataclass(frozen=True)
class Plan:
    """How a case is measured.

    Attributes:
        rounds: runs of each peer, in turn.
        step_rounds: single steps of each peer, in turn with plain PEFT's; 0 for none.
        limit_s: that one process may take until it answers.
        logs: a folder for what the processes print.
        shared_imports: processes are forked from one that has imported the libraries: fast where many short ones run,
            but how long a user waits for the first step is not measured. For a CPU alone: some libraries ask for the
            GPU when imported, and CUDA does not survive a fork.
        together: the processes of a round begin at once, import and load beside each other, and train one after the
            other, where all models fit in the memory; how long a user waits for the first step is not measured.
    """

    rounds: int = 1
    step_rounds: int = 0
    limit_s: float = 1800.0
    logs: Path = Path("runs/bench/finetune-logs")
    shared_imports: bool = False
    together: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("step_rounds", 0), ("limit_s", 1)):
            if not (number := getattr(self, name)) >= least:
                raise ValueError(f"{name}: expected at least {least}, got {number}")

    def imported(self, peer: Peer | None) -> tuple[str, ...]:
        """What a process finds imported; nothing for Unsloth, which must come first."""
        return _SHARED if self.shared_imports and not (peer and peer.unsloth) else ()


def measure(
    case: FinetuneCase,
    peers: Sequence[Peer],
    plan: Plan,
    add: Add,
    say: Callable[[str], None] = print,
    find: Make = make_source,
    make: Make = train,
) -> Result:
    """Run every peer, and record what it took.

    Args:
        peers: from `peers.choose`.
        add: takes the fields of a record.
        say: shows a line of progress.
        find, make: what happens in the process that finds the model, and in a peer's.

    Raises:
        LeftOutError: the model itself could not be made or found.
    """
    result = Result(case, alone=not (plan.shared_imports or plan.together))
    with TemporaryDirectory(prefix="fastpeft-bench-") as folder:
        try:
            given = (case, Path(folder, "model"))
            with Worker(find, given, plan.logs / "source.log", plan.limit_s, plan.imported(None)) as maker:
                source = maker.ask(SOURCE)
                result.ceilings = maker.ask(CEILINGS)
            result.task = source.task
            keep_ceilings(result, add)
            _Measuring(result, source, peers, plan, add, say, make, Path(folder)).all()
        except KeyboardInterrupt:
            result.interrupted = True
            say("interrupted; what was measured is kept")
    return result


@dataclass
class _Measuring:
    result: Result
    source: Any
    peers: Sequence[Peer]
    plan: Plan
    add: Add
    say: Callable[[str], None]
    make: Make
    folder: Path
    kept: set[str] = field(default_factory=set)
    begun: dict[str, Worker] = field(default_factory=dict)

    def all(self) -> None:
        case = self.result.case
        for peer in self.peers:
            if reason := why_not(peer, case, self.source.task):
                self._leave_out(peer.name, reason, failed=False)
        try:
            for i in range(self.plan.rounds):
                if self.plan.together:
                    self._begin([p for p in self.peers if not (i and p.name == EXACT)])
                for peer in self.peers if i % 2 == 0 else reversed(self.peers):
                    if peer.name != EXACT:  # which is not timed, and may run while others load
                        self._await_ready()
                    if peer.name not in self.result.left_out and not (i and peer.name == EXACT):
                        self._run(peer)
                    if i == self.plan.rounds - 1:
                        self._keep(peer.name)
        finally:  # an interruption costs the runs that were not made
            for worker in self.begun.values():
                worker.close()
            for peer in self.peers:
                self._keep(peer.name)
        if self.plan.step_rounds:
            self._single_steps()

    def _begin(self, peers: Sequence[Peer]) -> None:
        """The processes of all that take part."""
        case = self.result.case
        taking_part = [peer for peer in peers if peer.name not in self.result.left_out]
        for peer in taking_part:
            self.begun[peer.name] = self._worker(peer, case.steps)

    def _await_ready(self) -> None:
        """Before a run that is timed: nobody loads beside it. Who cannot be made ready is left out."""
        for name in list(self.begun):
            try:
                self.begun[name].ask(READY)
            except LeftOutError as error:
                self.begun.pop(name).close()
                self._leave_out(name, str(error), failed=True)

    def _worker(self, peer: Peer, steps: int) -> Worker:
        task = Task(self.result.case, self.source, peer, steps, self.folder / "trainer")
        log = self.plan.logs / f"{peer.name.replace(' ', '-')}.log"
        return Worker(self.make, task, log, self.plan.limit_s, self.plan.imported(peer))

    def _run(self, peer: Peer) -> None:
        runs = self.result.runs
        try:
            runs.setdefault(peer.name, []).append(self._outcome(peer))
            for other in peer.other_roundings:
                found = self.result.agreement(peer.name)
                if found is None or found.holds:
                    break
                how = "trained parameters moved by one rounding" if other.moved else "rows in another order"
                self.say(f"{peer.name}: losses differ by {found.found:.1e}; once more, {how}")
                runs[peer.name][-1] = self._outcome(other)
        except LeftOutError as error:
            if not runs[peer.name]:
                del runs[peer.name]
            self._leave_out(peer.name, str(error), failed=True)
            return
        if peer.name not in (EXACT, PEFT) and (reason := disagreement(self.result, peer.name)):
            self._leave_out(peer.name, reason, failed=True)

    def _outcome(self, peer: Peer) -> Outcome:
        worker = self.begun.pop(peer.name, None) or self._worker(peer, self.result.case.steps)
        with worker:
            outcome: Outcome = worker.ask(RUN)
        timed = median(outcome.ms[self.result.case.warmup :])
        self.say(f"{peer.name}: {timed:.1f} ms a step, loss {outcome.losses[0]:.4f} to {outcome.losses[-1]:.4f}")
        return outcome

    def _leave_out(self, name: str, reason: str, failed: bool) -> None:
        self.result.left_out[name] = reason
        if failed:
            self.result.failed.add(name)
        self.say(f"{name}: left out: {reason}")

    def _keep(self, name: str) -> None:
        if name not in self.kept and (name in self.result.runs or name in self.result.left_out):
            self.kept.add(name)
            keep(self.result, name, self.add)

    def _single_steps(self) -> None:
        """Each peer's process beside one of plain PEFT, so that no more than two models are in memory."""
        steps = self.plan.step_rounds + self.result.case.warmup
        pairs = [peer for peer in self.peers if peer.name in self.result.runs and peer.name not in self.result.left_out]
        reference = next(peer for peer in self.peers if peer.name == PEFT)
        if reference not in pairs:
            return
        with self._worker(reference, steps * len(pairs) + 1) as peft:
            try:
                peft.ask(STEPS)
            except LeftOutError as error:
                self.say(f"single steps: {PEFT}: {error}")
                return
            for peer in pairs:
                if peer.name in (PEFT, EXACT):
                    continue
                try:
                    with self._worker(peer, steps + 1) as worker:
                        worker.ask(STEPS)
                        self.result.steps[peer.name] = in_turn(worker, peft, self.result.case.warmup, steps)
                except LeftOutError as error:
                    self.say(f"single steps: {peer.name}: {error}")
                    continue
                keep_steps(self.result, peer.name, self.add)


def in_turn(worker: Worker, peft: Worker, warmup: int, steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds of the steps of two processes; who is first changes from round to round."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for i in range(steps):
        for j in (0, 1) if i % 2 == 0 else (1, 0):
            ms = (worker, peft)[j].ask(GO)
            if i >= warmup:
                times[j].append(ms)
    return times[0], times[1]
