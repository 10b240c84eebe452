"""Which token ends answers, and what hides it."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from fastpeft.data.chat import IGNORED
from fastpeft.data.endings import End, learned_end
from tests.checkpoints import characters

END = 1  # </s> of characters()
Row = tuple[list[int], list[int]]
WHOLE: Row = ([10, 11, END], [IGNORED, 11, END])
UNMARKED: Row = ([10, 11, END], [IGNORED, 11, IGNORED])
CUT: Row = ([10, 11, 12, 13], [IGNORED, 11, 12, 13])
CUT_LATER: Row = ([11, END, 10, 12], [11, END, IGNORED, 12])


@pytest.mark.parametrize(
    ("rows", "end"),
    [
        ([WHOLE], End(END)),
        ([UNMARKED], End(unlearned=END)),
        ([CUT], End(cut=True)),
        ([CUT_LATER], End(END)),
        ([CUT] * 100 + [WHOLE], End(END)),
        ([CUT, UNMARKED], End(unlearned=END)),
        ([([10, 11], [IGNORED, 11])], End()),
    ],
)
def test_how_answers_end(rows: list[Row], end: End) -> None:
    table: list[dict[str, Any]] = [{"input_ids": ids, "labels": labels} for ids, labels in rows]
    assert learned_end(datasets.Dataset.from_list(table), characters(), max_length=4) == end
