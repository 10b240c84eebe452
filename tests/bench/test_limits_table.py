"""The page shows what the GPU's records say of models that hardly fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastpeft.bench.limits_table import limits_table
from fastpeft.bench.records import load
from fastpeft.bench.tables import insert
from tests.docs.pages import DOCS

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h200" / "limits.jsonl"


def test_the_page_shows_the_records() -> None:
    text = (DOCS / "measured.md").read_text(encoding="utf-8")
    assert insert(text, limits_table(load(RECORD)), "limits") == text


def test_a_case_that_failed_has_no_row() -> None:
    records = load(RECORD.with_name("limits-fixed-segments.jsonl"))
    assert len(records) == 2 and "| llama" not in limits_table(records)


def test_cases_may_be_of_several_commits_but_not_of_several_drivers() -> None:
    records = load(RECORD)
    assert len({r.environment.commit for r in records}) > 1
    records[-8:] = [replace(r, environment=replace(r.environment, driver="1")) for r in records[-8:]]
    with pytest.raises(ValueError, match="one driver and the same packages, got 2"):
        limits_table(records)
    with pytest.raises(ValueError, match="got 0"):
        limits_table([])


def test_for_which_steps_a_peak_was_predicted_is_said() -> None:
    without = {"predicted_for": "steps without gradient accumulation"}
    records = [replace(r, settings={**r.settings, **without}) for r in load(RECORD)]
    assert limits_table(records).endswith("by `fastpeft plan`, for steps without gradient accumulation.")
    assert limits_table(load(RECORD)).endswith("by `fastpeft plan`, for steps with gradient accumulation.")
