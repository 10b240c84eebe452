"""What is kept for each shape of a batch is bounded: batches of ever new shapes do not make it grow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastpeft_kernels.common import bounded
from fastpeft_kernels.lora import direct, mixed_rows

CPU = torch.device("cpu")


def test_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go first, some at once."""
    monkeypatch.setattr(direct, "_decided", {})
    monkeypatch.setattr(direct, "_decide", lambda rows, device, group: direct.ALL if rows % 2 == 0 else None)
    projection = SimpleNamespace(weight=SimpleNamespace(shape=(4, 4)))
    group: Any = SimpleNamespace(
        projections=[projection], widths=lambda: (2,), dtypes=None, backend="auto", adapter_index=None
    )
    most = bounded.MOST
    for rows in range(1, most + 100):
        assert direct._small(rows, torch.device("cpu"), group) == (direct.ALL if rows % 2 == 0 else None)
        assert rows > most or len(direct._decided) == rows
        assert len(direct._decided) <= most
    kept = [key[2] for key in direct._decided]
    assert kept == list(range(bounded._AT_ONCE + 1, most + 100))


@pytest.mark.parametrize(
    ("cached", "rest"),
    [
        (mixed_rows._counts, ()),
        (mixed_rows._row_groups, (True, CPU)),
        (mixed_rows._blocks, (3, 8, 1, CPU)),
        (mixed_rows.rows_with, ((0,), CPU)),
        (mixed_rows.rows_by_owner, (CPU,)),
    ],
)
def test_rows_of_mixed_batches(cached: Any, rest: tuple[Any, ...]) -> None:
    most = cached.cache_info().maxsize
    assert most in (64, 256)
    for rows in range(1, most + 50):
        cached((0,) * rows + (1,), *rest)
    assert cached.cache_info().currsize == most
