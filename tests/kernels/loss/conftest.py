"""What the tests of the Triton kernels of given logits share."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def module() -> ModuleType:
    return pytest.importorskip("fastpeft_kernels.loss.divergence_triton")


@pytest.fixture
def small() -> Any:
    """Blocks that the interpreter can afford, so that a row has several."""
    return pytest.importorskip("fastpeft_kernels.loss.tiles").Config(16, 1)
