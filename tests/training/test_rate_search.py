"""Which rates are tried, which is taken, and what is kept of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fastpeft.errors import RunFailed, UserError
from fastpeft.training.rate_search import RateSearch, Trial, best, read, table, write


def test_rates_lie_evenly_on_a_logarithmic_scale() -> None:
    assert RateSearch(low=1e-5, high=1e-3, count=3).tried == [1e-5, 1e-4, 1e-3]
    assert RateSearch(rates=[2e-3, 1e-4, 2e-3]).tried == [1e-4, 2e-3]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "expected either rates, or low and high"),
        ({"rates": [1e-3, 1e-2], "low": 1e-5}, "expected either rates, or low and high"),
        ({"low": 1e-3}, "low: expected more than 0 and less than"),
        ({"low": 1e-3, "high": 1e-4}, "low: expected more than 0 and less than"),
        ({"rates": [1e-3]}, "rates: expected at least two different ones above 0, got [0.001]"),
        ({"rates": [1e-3, 0.0]}, "rates: expected at least two different ones above 0"),
        ({"rates": [1e-3, 1e-2], "steps": 0}, "steps: expected at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as found:
        RateSearch(**settings).check()
    assert said in str(found.value)


def test_the_lowest_loss_is_taken_and_a_diverged_run_never() -> None:
    trials = [Trial(1e-5, 0.9), Trial(1e-4, 0.5), Trial(1e-3, 0.5), Trial(1e-2, math.inf)]
    assert best(trials) == Trial(1e-4, 0.5)
    lines = table(trials).splitlines()
    assert lines[3] == "| 0.0001 | 0.5000 | taken |" and lines[5] == "| 0.01 | not a number |  |"
    with pytest.raises(RunFailed, match="no rate gave a loss that is a number"):
        best(trials[3:])


def test_what_was_found_is_read_back(tmp_path: Path) -> None:
    trials = [Trial(1e-5, 0.9), Trial(1e-2, math.inf)]
    assert read(tmp_path) is None
    write(trials, tmp_path)
    assert read(tmp_path) == trials
