"""Losses from hidden states beside their peers."""

from collections.abc import Callable

from fastpeft.bench.ops.case import Direction, OpCase

OP = "loss"


def test_loss(case: OpCase, direction: Direction, beside_peers: Callable[[OpCase, Direction], None]) -> None:
    beside_peers(case, direction)
