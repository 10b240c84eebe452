"""LoRA projections beside their peers."""

from collections.abc import Callable

from fastpeft.bench.ops.case import Direction, OpCase

OP = "lora"


def test_lora(case: OpCase, direction: Direction, beside_peers: Callable[[OpCase, Direction], None]) -> None:
    beside_peers(case, direction)
