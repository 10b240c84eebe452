"""Rows in two parts, drawn by a seed: the one place where rows are held back."""

from __future__ import annotations

from collections.abc import Sequence

from fastpeft.errors import UserError
from fastpeft.requirements import require


def divided(
    total: int, size: int | float, seed: int, key: str, classes: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """(places that stay, places that are drawn), of `total` places from 0.

    Args:
        total: how many places there are.
        size: how many are drawn; a float below 1 is their share of all, at least one.
        seed: of the draw.
        key: the configuration's name of what asks for it, for messages.
        classes: of each place; each class then has its share in both parts.

    Raises:
        UserError: nothing would be left on one side, or a class is too small to be in both.
        MissingExtraError: scikit-learn is not installed.
    """
    import numpy as np

    count = size if isinstance(size, int) else max(1, round(total * size))
    if not 0 < count < total:
        raise UserError(f"{key}: expected at least one row on either side, got {total} in all")
    if classes is None:
        order = np.random.default_rng(seed).permutation(total).tolist()  # as `datasets` draws
        return order[count:], order[:count]
    selection = require("train", "sklearn.model_selection", "dividing the data")
    try:
        rest, drawn = selection.train_test_split(range(total), test_size=count, random_state=seed, stratify=classes)
    except ValueError as error:
        raise UserError(f"{key}: rows cannot be divided with each class in its share: {error}") from error
    return list(rest), list(drawn)
