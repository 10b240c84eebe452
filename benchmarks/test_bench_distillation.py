"""Distillation from hidden states beside its peers."""

from collections.abc import Callable

from fastpeft.bench.ops.case import Direction, OpCase

OP = "distillation"


def test_distillation(case: OpCase, direction: Direction, beside_peers: Callable[[OpCase, Direction], None]) -> None:
    beside_peers(case, direction)
