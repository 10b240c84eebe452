"""What fastpeft knows of transformers' models: nothing about architectures, a little about calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "mems", "cache")


def passes_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True when a call hands the module a key-value cache, which a second run of the same call would fill twice."""
    if any(kwargs.get(name) is not None for name in CACHE_NAMES):
        return True
    return any(hasattr(value, "get_seq_length") and hasattr(value, "update") for value in (*args, *kwargs.values()))
