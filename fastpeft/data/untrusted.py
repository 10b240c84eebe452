"""What a file of data is, looked at before a library reads it: it may come from anybody."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fastpeft.errors import UserError
from fastpeft.integrations.datasets import archive_format

from .json_files import check_lines

GROWTH, FREE = 200, 1 << 30
"""How many times its size a Parquet file may hold, and bytes that any may."""


def check_file(file: Path, loader: str, key: str) -> None:
    """Look at a file of data.

    Args:
        file: to be read.
        loader: "json", "csv", "parquet" or "text".
        key: the configuration's name for the path, for messages.

    Raises:
        UserError: it is an archive under another name, would grow out of proportion, or as `check_lines`.
    """
    if loader == "parquet":
        _check_growth(file, key)
    elif kind := archive_format(str(file)):
        raise UserError(f"{key}: expected {loader}, got {kind} in {file}; unpack it first")
    elif loader == "json":
        check_lines(file, key)


def check_saved(folder: Path, key: str) -> None:
    """Raise UserError if what `datasets` saved in a folder names files outside of it."""
    names: set[object] = set()
    splits = folder / "dataset_dict.json"
    try:
        if splits.is_file():
            names |= set(json.loads(splits.read_text(encoding="utf-8"))["splits"])
        for state in (folder / "state.json", *folder.glob("*/state.json")):
            if state.is_file():
                names |= {one["filename"] for one in json.loads(state.read_text(encoding="utf-8"))["_data_files"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{key}: {folder} cannot be read as saved by datasets: {error}") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:]", name):
            raise UserError(f"{key}: expected names of files in {folder}, got {name!r}")


def _check_growth(file: Path, key: str) -> None:
    """Counted row by row: what a file says of its own size may be wrong."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    most, found = max(FREE, GROWTH * file.stat().st_size), 0
    try:
        with ParquetFile(file) as rows:
            for batch in rows.iter_batches(batch_size=1024):
                found += batch.nbytes
                if found > most:
                    break
    except (ArrowException, OSError, MemoryError):
        return  # the reader says what is wrong
    if found > most:
        raise UserError(f"{key}: expected at most {most >> 20} MiB in {file}, got more: it grows out of proportion")
