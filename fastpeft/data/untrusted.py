"""What a file of data is, looked at before a library reads it: it may come from anybody."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fastpeft.errors import UserError
from fastpeft.integrations.datasets import archive_format

from . import growth
from .json_files import check_lines

GROWTH, FREE = 200, 1 << 30
"""How many times its size a file of rows may hold, and bytes that any may."""


def check_files(files: Sequence[str], loader: str, key: str) -> None:
    """Before `datasets` reads local files.

    Args:
        files: which exist.
        loader: `datasets`' name of their format.
        key: the configuration's name for the path, for messages.

    Raises:
        UserError: one is an archive under another name, would grow out of proportion, cannot be read to its end, or as
            `check_lines`.
    """
    if loader == "parquet":
        _check_growth([Path(file) for file in files], loader, key)
        return
    for file in files:
        if kind := archive_format(file):
            raise UserError(f"{key}: expected {loader}, got {kind} in {file}; unpack it first")
        if loader == "json":
            check_lines(Path(file), key)


def check_saved(folder: Path, key: str) -> None:
    """Raise UserError if what `datasets` saved in a folder names files outside of it, or would grow."""
    names: set[object] = set()
    files: list[Path] = []
    splits = folder / "dataset_dict.json"
    try:
        if splits.is_file():
            names |= set(json.loads(splits.read_text(encoding="utf-8"))["splits"])
        for state in (folder / "state.json", *folder.glob("*/state.json")):
            if state.is_file():
                found = [one["filename"] for one in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
                names.update(found)
                files += [state.parent / str(name) for name in found]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{key}: {folder} cannot be read as saved by datasets: {error}") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:]", name):
            raise UserError(f"{key}: expected names of files in {folder}, got {name!r}")
    _check_growth([file for file in files if file.is_file()], "arrow", key)  # of others the reader says what is wrong


def _check_growth(files: Sequence[Path], kind: str, key: str) -> None:
    """In a process that may not take more: see `growth`."""
    if not files:
        return
    most = [max(FREE, GROWTH * file.stat().st_size) for file in files]
    pairs = [str(each) for pair in zip(files, most, strict=True) for each in pair]
    places = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(growth.__file__), kind, *pairs],
        capture_output=True, text=True, errors="replace", env={**os.environ, "PYTHONPATH": places},
    )  # fmt: skip
    answers = done.stdout.splitlines()
    answers += [growth.GROWS] * (len(files) - len(answers))  # it ended at the first of these
    for file, limit, said in zip(files, most, answers, strict=True):
        if said == growth.GROWS:
            raise UserError(
                f"{key}: expected at most {limit >> 20} MiB in {file}, got more: it grows out of proportion"
            )
        if said != growth.FINE:
            raise UserError(f"{key}: {file} cannot be read as {kind}: {said}")
