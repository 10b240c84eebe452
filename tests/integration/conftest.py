"""What these tests share."""

from __future__ import annotations

import pytest

from fastpeft_kernels.native.extension import group_extension


@pytest.fixture(scope="session", autouse=True)
def groups_in_cpp() -> None:
    """From the first test on, not from when the compiler is done."""
    group_extension(wait=True)
