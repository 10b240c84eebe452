"""Rows in two parts: every place once, drawn by the seed, each class in its share."""

from __future__ import annotations

from collections import Counter

import pytest

from fastpeft.data.dividing import divided
from fastpeft.errors import UserError


@pytest.mark.parametrize(("size", "drawn"), [(3, 3), (0.25, 5), (0.001, 1)])
def test_every_place_is_in_one_part(size: int | float, drawn: int) -> None:
    rest, held = divided(20, size, 0, "key")
    assert len(held) == drawn and sorted([*rest, *held]) == list(range(20))
    assert divided(20, size, 0, "key") == (rest, held) != divided(20, size, 1, "key")


def test_each_class_has_its_share_in_both_parts() -> None:
    classes = [0] * 30 + [1] * 10
    rest, held = divided(40, 8, 0, "key", classes)
    assert Counter(classes[place] for place in held) == {0: 6, 1: 2}
    assert Counter(classes[place] for place in rest) == {0: 24, 1: 8}


@pytest.mark.parametrize(("total", "size"), [(1, 0.5), (3, 0.99), (3, 3), (3, 0)])
def test_a_side_with_nothing_is_an_error(total: int, size: int | float) -> None:
    with pytest.raises(UserError, match=f"key: expected at least one row on either side, got {total} in all"):
        divided(total, size, 0, "key")


def test_a_class_of_one_row_cannot_be_on_both_sides() -> None:
    with pytest.raises(UserError, match="key: rows cannot be divided with each class in its share"):
        divided(4, 2, 0, "key", [0, 0, 0, 1])
