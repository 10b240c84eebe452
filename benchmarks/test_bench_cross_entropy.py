"""Cross-entropy of logits beside its peers."""

from collections.abc import Callable

from fastpeft.bench.ops.case import Direction, OpCase

OP = "cross_entropy"


def test_cross_entropy(case: OpCase, direction: Direction, beside_peers: Callable[[OpCase, Direction], None]) -> None:
    beside_peers(case, direction)
