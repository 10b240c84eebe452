"""Blocks of a size that makes several of a small case."""

from __future__ import annotations

import pytest

from fastpeft_kernels.attention import blocks


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 queries, the least there are, by 8 keys."""
    monkeypatch.setattr(blocks, "CPU", blocks.Sizes(16, 8, 16 * 8))
