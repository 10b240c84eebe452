"""Blocks of a size that makes several of a small case."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastpeft_kernels.attention import blocks
from fastpeft_kernels.attention.candidates import flash, flex, registry


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 queries, the least there are, by 8 keys."""
    monkeypatch.setattr(blocks, "CPU", blocks.Sizes(16, 8, 16 * 8))


@pytest.fixture(autouse=True)
def _candidates_afresh() -> Iterator[None]:
    """Nothing is known of what is installed and of what failed."""
    forgets = (flash.function_of.cache_clear, registry.labels.cache_clear, flex._failed.clear)
    for forget in forgets:
        forget()
    yield
    for forget in forgets:
        forget()
