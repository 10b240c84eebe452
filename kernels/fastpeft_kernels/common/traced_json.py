"""JSON that torch.compile can trace the writing of: the json module it cannot."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=4096)
def parsed(text: str) -> Any:
    """What JSON says; not to be written into."""
    return json.loads(text)


def to_json(value: Any) -> str:
    """None, bool, str, numbers, and lists and dicts of these, as JSON; strings without what JSON escapes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join([to_json(item) for item in value]) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join([f'"{key}": {to_json(item)}' for key, item in value.items()]) + "}"
    return str(value)
