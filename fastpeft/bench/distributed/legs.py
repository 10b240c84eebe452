"""What is run: the same training, spread in several ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..bases import DENSE, NF4

STEPS, HALF = 24, 12
ROWS, TOKENS = 8, 24
"""Of one step of all processes together; padding included."""


@dataclass(frozen=True)
class Leg:
    """One training.

    Attributes:
        base: one of `bases.BASES`.
        way: how it is spread; "fsdp2" shards every layer and the model around them.
        processes: that train together.
        start: the leg whose checkpoint after HALF steps it goes on from; empty for none.
        accelerated: not PEFT's own forward.
    """

    base: str
    way: Literal["alone", "ddp", "fsdp2"] = "alone"
    processes: int = 1
    start: Leg | None = None
    accelerated: bool = True

    @property
    def name(self) -> str:
        words = "one process" if self.way == "alone" else f"{self.way.upper()} x {self.processes}"
        if self.start is not None:
            words = f"{self.start.name}, then {words}"
        return words if self.accelerated else f"{words}, plain PEFT"


def legs(base: str) -> tuple[Leg, ...]:
    """Of one base; the first is what the others are held to, and whoever goes on comes after whom it goes on from."""
    ddp, sharded = Leg(base, "ddp", 2), Leg(base, "fsdp2", 2)
    return (
        Leg(base),
        Leg(base, accelerated=False),
        ddp,
        Leg(base, "ddp", 4),
        sharded,
        Leg(base, "fsdp2", 4),
        Leg(base, "fsdp2", 4, sharded),
        Leg(base, start=sharded),
        Leg(base, "fsdp2", 2, ddp),
    )


LEGS = (*legs(DENSE), *legs(NF4))
