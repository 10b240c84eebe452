"""Decoding of NF4 beside their peers."""

from collections.abc import Callable

from fastpeft.bench.ops.case import Direction, OpCase

OP = "quant"


def test_quant(case: OpCase, direction: Direction, beside_peers: Callable[[OpCase, Direction], None]) -> None:
    beside_peers(case, direction)
