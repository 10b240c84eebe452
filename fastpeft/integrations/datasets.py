"""What `datasets` would do with a file or a column beyond reading it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_network(wanted: bool = True) -> Iterator[None]:
    """Meanwhile `datasets` asks nobody: it counts each reading of a local file at a server, too."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def archive_format(path: str) -> str | None:
    """As what kind of archive `datasets` would unpack a file, whatever its name: "gzip", "zip", ...; None for none."""
    from datasets.utils.extract import Extractor

    try:
        return Extractor.infer_extractor_format(path)  # type: ignore[no-any-return]
    except (MemoryError, OverflowError, ValueError):  # a header, as of LZMA with a dictionary of 4 GiB
        return None


def opened_columns(rows: Any) -> list[str]:
    """Columns of pictures, sound and the like: whoever looks at a row has the files and addresses in it opened."""
    return [name for name, feature in rows.features.items() if _opens(feature)]


def _opens(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_opens, feature.values()))
    if isinstance(feature, (list, tuple)):
        return any(map(_opens, feature))
    opens = hasattr(feature, "decode_example") and type(feature).__name__ != "Json"  # values of several types, as text
    return opens or _opens(getattr(feature, "feature", None) or ())
