"""What the tests of every op share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def nothing_compiled_before() -> Iterator[None]:
    """For a whole file: `pytestmark = pytest.mark.usefixtures("nothing_compiled_before")`."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
