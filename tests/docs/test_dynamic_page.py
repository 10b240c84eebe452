"""The tables of docs/strategies/dynamic.md are made of the trials that were recorded."""

from __future__ import annotations

from benchmarks import dynamic


def test_the_page_has_the_tables() -> None:
    trials, page = dynamic.read(dynamic.TRIALS), dynamic.PAGE.read_text(encoding="utf-8")
    assert dynamic.table(trials, dynamic.read(dynamic.STEPS)) in page and dynamic.ranks_table(trials) in page
