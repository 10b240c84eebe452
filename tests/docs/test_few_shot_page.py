"""The table of docs/strategies/few-shot.md is made of the draws that were recorded."""

from __future__ import annotations

from benchmarks import few_shot


def test_the_page_has_the_table() -> None:
    assert few_shot.table(few_shot.read()) in few_shot.PAGE.read_text(encoding="utf-8")
