"""The table of docs/how-to/trainers.md is that of the trainings that the tests run."""

from __future__ import annotations

from tests.integration.trainers.cases import table

from .pages import read


def test_the_page_has_the_table() -> None:
    assert "\n".join(table()) in read("docs/how-to/trainers.md")
