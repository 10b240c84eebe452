"""An embedding of which some tokens are trained, beside its peers."""

from collections.abc import Callable

from fastpeft.bench.ops.case import Direction, OpCase

OP = "tokens"


def test_tokens(case: OpCase, direction: Direction, beside_peers: Callable[[OpCase, Direction], None]) -> None:
    beside_peers(case, direction)
