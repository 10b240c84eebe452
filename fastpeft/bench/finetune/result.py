"""What was measured of a case, and which of it counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from .agreement import Agreement, agreement
from .case import FinetuneCase
from .peers import PEFT, REQUIRED
from .rows import tokens_of_batch
from .worker import Outcome


@dataclass
class Result:
    """Of a case, by peer.

    Attributes:
        runs: one a round.
        steps: milliseconds of single steps, and of plain PEFT's in the same rounds.
        left_out: why a peer has no times; `failed` are those of them that could have had some.
        alone: whether each process began alone and imported all that it needed, so that how long its first step took
            counts.
        ceilings: of the machine, as `ops.ceilings.measure` names them.
    """

    case: FinetuneCase
    alone: bool = True
    task: str = ""
    ceilings: dict[str, list[float]] = field(default_factory=dict)
    runs: dict[str, list[Outcome]] = field(default_factory=dict)
    steps: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    interrupted: bool = False

    def agreement(self, peer: str) -> Agreement | None:
        """Of the run whose losses are furthest off; None where there is nothing to compare with."""
        own = {name: self.runs[name][0].losses for name in REQUIRED if name in self.runs}
        found = [agreement(run.losses, own) for run in self.runs.get(peer, ())]
        return max((each for each in found if each), key=lambda each: each.found, default=None)

    def step_ms(self, peer: str) -> list[float]:
        """Of a run's steps after the warm-up, all rounds."""
        return [ms for run in self.runs[peer] for ms in run.ms[self.case.warmup :]]

    def speed(self, peer: str) -> list[float]:
        """Tokens a second, by each of these steps."""
        tokens = tokens_of_batch(self.task, self.case.rows, self.case.tokens)
        return [1e3 * tokens / ms for ms in self.step_ms(peer)]

    def utilisation(self, peer: str) -> float | None:
        """The model's operations a second over the machine's matrix rate; None where either is not known."""
        flops = next((run.flops for run in self.runs.get(PEFT, ()) if run.flops), 0.0)
        rate = self.ceilings.get(f"matrix {self.case.dtype}")
        return flops / (median(self.step_ms(peer)) * 1e-3) / (median(rate) * 1e12) if flops and rate else None

    @property
    def exit_code(self) -> int:
        """1 where a run of ours failed or learned something else than PEFT; 130 when it was interrupted."""
        return 130 if self.interrupted else int(any(name.startswith("fastpeft") for name in self.failed))


def disagreement(result: Result, peer: str) -> str | None:
    """Why the peer's times do not count; None where they do."""
    found = result.agreement(peer)
    if found is None:
        return f"nothing to compare its losses with: {PEFT}: {result.left_out.get(PEFT, 'its losses are no numbers')}"
    if found.holds:
        return None
    return f"losses differ from PEFT's: by {found.found:.1e} of the reference, where {found.allowed:.1e} is allowed"
