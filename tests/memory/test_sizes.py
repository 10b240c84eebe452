"""Sizes as people write them."""

from __future__ import annotations

import pytest

from fastpeft.memory.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("1.5 gib", 3 * 2**29), ("512MiB", 2**29), (1000, 1000), ("7B", 7)],
)
def test_units(text: str | int, size: int) -> None:
    assert parse_size(text, "gpu_memory") == size


@pytest.mark.parametrize("text", ["24", "24G", "GiB", "-1GiB", "0GiB", "nan GiB", "9999TiB", 0, True, None, "1e3GiB"])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match=r"gpu_memory: expected .*, got "):
        parse_size(text, "gpu_memory")  # type: ignore[arg-type]
