"""Rotary embeddings beside their peers."""

from collections.abc import Callable

from fastpeft.bench.ops.case import Direction, OpCase

OP = "rope"


def test_rope(case: OpCase, direction: Direction, beside_peers: Callable[[OpCase, Direction], None]) -> None:
    beside_peers(case, direction)
