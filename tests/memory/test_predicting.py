"""The predicted peak of a step on this CPU, against what torch's allocator was asked for."""

from __future__ import annotations

import pytest

from fastpeft.bench.planned import cases, compare
from fastpeft.bench.steps import StepCase

WITHIN = 0.05
REGULAR = ("llama lora float32 5x256 2x128 tokens 2000 words r=16 checkpointing",)


def _few() -> list[StepCase]:
    return [case for case in cases() if case.name in REGULAR]


@pytest.mark.parametrize("case", _few(), ids=lambda case: case.name)
def test_peak(case: StepCase) -> None:
    assert abs(compare(case).ratio - 1) <= WITHIN


def _others() -> list[object]:
    """Gemma 3 with checkpointing is predicted 6 % too low at 320 tokens."""
    low = pytest.mark.xfail(strict=True, reason="predicted 6 % too low, not understood")
    return [
        pytest.param(case, marks=low, id=case.name)
        if (case.family, case.checkpointing, case.tokens) == ("gemma3", True, 320)
        else pytest.param(case, id=case.name)
        for case in cases()
        if case.name not in REGULAR
    ]


@pytest.mark.full
@pytest.mark.parametrize("case", _others())
def test_every_peak(case: StepCase) -> None:
    assert abs(compare(case).ratio - 1) <= WITHIN


def test_the_names_are_cases() -> None:
    assert len(_few()) == len(REGULAR) and len(cases()) >= 24
