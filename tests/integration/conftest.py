"""What these tests share."""

from __future__ import annotations

import pytest

from fastpeft.layers import head_call
from fastpeft_kernels.native.extension import group_extension


@pytest.fixture(autouse=True)
def logits_left_out_however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models' logits are fewer than those that are worth leaving out on a CPU."""
    monkeypatch.setattr(head_call, "FEW_ON_CPU", 0)
    monkeypatch.setattr(head_call, "FEW_SLOW_ON_CPU", 0)


@pytest.fixture(scope="session", autouse=True)
def groups_in_cpp() -> None:
    """From the first test on, not from when the compiler is done."""
    group_extension(wait=True)
