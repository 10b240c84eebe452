"""The table of the longest contexts in the documentation: as `python -m fastpeft.bench.planned --table` makes it."""

from __future__ import annotations

from functools import cache
from itertools import pairwise, product
from pathlib import Path

import pytest

from fastpeft.bench.planned_table import CARDS, MODELS, cell, contexts, model_for, row
from fastpeft.memory.plan.known import KNOWN

PAGE = Path(__file__).parents[2] / "docs/concepts/memory.md"
NAMED = list(product(MODELS, CARDS))

model = cache(model_for)


def lines() -> list[str]:
    text = PAGE.read_text()
    begin, end = (f"<!-- measured contexts: {word} -->\n" for word in ("begin", "end"))
    return text[text.index(begin) + len(begin) : text.index(end)].splitlines()


def cells(line: str) -> list[str]:
    return [each.strip() for each in line.strip("|").split("|")]


def test_form() -> None:
    """The same frame, a row for each model and GPU, and no fewer tokens where there is more memory or freedom."""
    found, frame = lines(), contexts([]).splitlines()
    assert found[:2] == frame[:2] and found[-2] == "" and found[-1].split(" torch ")[0] == frame[-1].split(" torch ")[0]
    rows = [cells(line) for line in found[2:-2]]
    assert [(name, int(card.split()[0])) for name, card, *_ in rows] == NAMED
    for name in MODELS:
        of_it = [
            (int(kept.strip("-") or 0), int(most.strip("-") or 0)) for one, _, kept, most, *_ in rows if one == name
        ]
        assert all(kept <= most <= KNOWN[name][1]["max_position_embeddings"] for kept, most in of_it)
        assert all(less[0] <= more[0] and less[1] <= more[1] for less, more in pairwise(of_it))


@pytest.mark.full
@pytest.mark.parametrize(("name", "card"), NAMED, ids=lambda each: str(each))
def test_rows(name: str, card: int) -> None:
    assert row(cell(name, model(name), card)) == lines()[2 + NAMED.index((name, card))]
