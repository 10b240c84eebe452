"""Sizes of memory as people write them."""

from __future__ import annotations

import re

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?[iI]?[bB])\s*")
MOST = 2**50


def parse_size(text: str | int, name: str) -> int:
    """Bytes of "24GiB" (2**30 each) or "24GB" (10**9 each); a number is bytes already.

    Args:
        name: of the argument, for messages.

    Raises:
        ValueError: none of these, nothing, or more than a pebibyte.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = float(text)
    else:
        found = _SIZE.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise ValueError(f"{name}: expected a size such as 24GiB or 24GB, got {text!r}")
        size = float(found[1]) * UNITS[found[2].upper()]
    if not 1 <= size <= MOST:
        raise ValueError(f"{name}: expected 1 byte to 1024 TiB, got {text!r}")
    return int(size)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def gib_above(size: float) -> float:
    """GiB, in hundredths and no less than it is: what to ask for."""
    return -(-size * 100 // 2**30) / 100


def mib_or_gib(size: float) -> str:
    """The same, in MiB below a GiB."""
    return gib(size) if size >= 2**30 else f"{size / 2**20:.2f} MiB"
