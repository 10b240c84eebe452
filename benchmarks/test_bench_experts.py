"""Mixtures of experts with LoRA beside their peers."""

from collections.abc import Callable

from fastpeft.bench.ops.case import Direction, OpCase

OP = "experts"


def test_experts(case: OpCase, direction: Direction, beside_peers: Callable[[OpCase, Direction], None]) -> None:
    beside_peers(case, direction)
