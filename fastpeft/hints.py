"""What a user most likely meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(given: Any, known: Iterable[Any], cutoff: float = 0.6) -> str | None:
    """The nearest of the known names; None if none is near. `cutoff`: from 0 for all to 1 for the same."""
    near = difflib.get_close_matches(str(given), [str(one) for one in known], n=1, cutoff=cutoff)
    return near[0] if near else None


def did_you_mean(given: Any, known: Iterable[Any]) -> str:
    """The end of a message, such as ", did you mean 'lora.r'?"; empty if no known name is near."""
    near = nearest(given, known)
    return f", did you mean {near!r}?" if near else ""
