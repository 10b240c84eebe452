"""What was noticed, each kind once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["not-finite", "loss", "no-gradient", "no-labels", "no-input", "vocabulary", "leak", "padding"]


@dataclass(frozen=True)
class Notice:
    """Something that is wrong with a training.

    Attributes:
        kind: one of the seven kinds; "loss" is a loss that is no number while what is trained still is.
        text: what was found, where, and what to do; a sentence without its full stop.
    """

    kind: Kind
    text: str

    def __str__(self) -> str:
        return self.text


class Notices:
    """Those of one training.

    Args:
        tell: called with the text of each, once.

    Attributes:
        found: in their order.
    """

    def __init__(self, tell: Callable[[str], object]) -> None:
        self.found: list[Notice] = []
        self._tell = tell

    def add(self, kind: Kind, text: str | None) -> None:
        """Nothing happens where `text` is None, or one of this kind is there."""
        if text is not None and not any(notice.kind == kind for notice in self.found):
            self.found.append(Notice(kind, text))
            self._tell(text)


def shortly(names: list[str], most: int = 3) -> str:
    """Some of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
