"""The page shows what the GPU's records say of models that hardly fit."""

from __future__ import annotations

from pathlib import Path

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
