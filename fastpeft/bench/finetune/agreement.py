"""Whether a run computed what plain PEFT computes, told by its losses.

Losses of two correct runs drift apart with the steps, because each rounds otherwise. How far is measured: plain PEFT is
run three times from the same weights over the same rows, in the next wider dtype, as it is, and with the rows of each
batch in reverse order. A run agrees when its losses are no further from the wider ones than twice what the further of
the two others is, and a few roundings of the loss itself, which is fp32.

Training is not smooth: what crosses zero by rounding turns a ReLU's gradient, or the sign of a first step of Adam,
over. Of six runs of plain PEFT over a T5 with ReLU (2 layers of width 128, fp32, 50 steps) from parameters that
were moved by one rounding, one left the float64 losses by 7e-5, the others by up to 3.8e-6; with gated GELU all stayed
within 3e-7. So a run that is too far off is tried again with other roundings (`Peer.other_roundings`), twice. A wrong
computation is wrong each time; chance rarely errs three times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .peers import AGAIN, EXACT, PEFT

FACTOR = 2.0
ROUNDING = 4 * 2.0**-23


@dataclass(frozen=True)
class Agreement:
    """Of one run's losses.

    Attributes:
        found: largest relative difference from the reference over the steps.
        allowed: how much that may be.
        from_peft: largest relative difference from plain PEFT in the same dtype.
    """

    found: float
    allowed: float
    from_peft: float

    @property
    def holds(self) -> bool:
        return self.found <= self.allowed


def difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Largest relative difference of a step; infinite where the number of steps differs or a loss is no number."""
    if len(losses) != len(reference) or not all(map(math.isfinite, [*losses, *reference])):
        return math.inf
    return max((abs(a - b) / max(abs(b), ROUNDING) for a, b in zip(losses, reference, strict=True)), default=math.inf)


def agreement(losses: Sequence[float], runs: Mapping[str, Sequence[float]]) -> Agreement | None:
    """How a run's losses compare with those of PEFT's runs.

    Args:
        losses: one a step.
        runs: PEFT's by name of the peer; without EXACT, PEFT's own is the reference, and its distance from AGAIN is
            what measures the rounding.

    Returns:
        None where there is nothing to compare with: PEFT did not run, or only once, or its losses are no numbers.
    """
    reference = runs.get(EXACT, runs.get(PEFT))
    own = [difference(runs[name], reference) for name in (PEFT, AGAIN) if name in runs] if reference else []
    if PEFT not in runs or reference is None or not any(own) or not math.isfinite(max(own)):
        return None
    allowed = FACTOR * max(own) + ROUNDING
    return Agreement(difference(losses, reference), allowed, difference(losses, runs[PEFT]))
