"""Rows from a file, a folder or the hub, as a `datasets.Dataset`."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError
from fastpeft.requirements import require

LOADERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
DOCUMENTS = (".txt", ".md")
"""Files that are one text each, of any length."""


def load_rows(path: str, *, split: str, name: str | None = None, key: str = "data.path", split_key: str = "") -> Any:
    """Rows as `datasets` gives them.

    Args:
        path: a file of LOADERS, a folder of such files or saved by `datasets`, or a data set's ID on the hub.
        split: which split, where there are several.
        name: which of a hub data set's configurations.
        key, split_key: the configuration's names for path and split, for messages.

    Returns:
        A `datasets.Dataset`; a text file is one row with the column `text`.

    Raises:
        UserError: there is no such thing, it cannot be read, or it is empty.
        MissingExtraError: `datasets` is not installed.
    """
    datasets = require("train", "datasets", "reading data")
    split_key = split_key or key.replace("path", "split")
    local = Path(path).expanduser()
    if local.is_file():
        rows = _from_file(datasets, local, key)
    elif local.is_dir():
        rows = _from_folder(datasets, local, key)
    elif _looks_local(path):
        raise UserError(f"{key}: expected a file, a folder or a hub ID, got {path}, which is not there{_near(local)}")
    else:
        rows = _from_hub(datasets, path, name, key)
    rows = _one_split(datasets, rows, split, split_key)
    if len(rows) == 0:
        raise UserError(f"{key}: expected at least one row, got none in {path}")
    return rows


def is_document(path: str) -> bool:
    """Whether rows of `path` are whole texts, to be divided rather than cut."""
    local = Path(path).expanduser()
    if local.is_dir():
        found = [file for file in local.iterdir() if file.suffix.lower() in LOADERS]
        return bool(found) and all(file.suffix.lower() in DOCUMENTS for file in found)
    return local.suffix.lower() in DOCUMENTS


def _from_file(datasets: Any, path: Path, key: str) -> Any:
    loader = LOADERS.get(path.suffix.lower())
    if loader is None:
        raise UserError(f"{key}: expected one of {', '.join(LOADERS)}, got {path.name}")
    if path.stat().st_size == 0:
        raise UserError(f"{key}: expected at least one row, got an empty file: {path}")
    return _load(datasets, loader, [str(path)], key, path)


def _load(datasets: Any, loader: str, files: list[str], key: str, path: Path) -> Any:
    options: dict[str, Any] = {"sample_by": "document"} if loader == "text" else {}
    if loader == "csv" and path.suffix.lower() == ".tsv":
        options["sep"] = "\t"
    try:
        return datasets.load_dataset(loader, data_files=files, split="train", **options)
    except Exception as error:  # pyarrow's, pandas' and datasets' own, by the format
        reason = next((found for file in files if (found := _wrong_json(file))), None) if loader == "json" else None
        raise UserError(f"{key}: {reason or f'{path} cannot be read as {loader}: {_deepest(error)}'}") from error


def _from_folder(datasets: Any, path: Path, key: str) -> Any:
    if any((path / mark).is_file() for mark in ("dataset_dict.json", "state.json")):
        try:
            return datasets.load_from_disk(str(path))
        except Exception as error:
            raise UserError(f"{key}: {path} cannot be read as saved by datasets: {_deepest(error)}") from error
    by_loader: dict[str, list[str]] = {}
    for file in sorted(path.iterdir()):
        loader = LOADERS.get(file.suffix.lower())
        if loader and file.name.lower() != "readme.md":
            by_loader.setdefault(loader, []).append(str(file))
    if not by_loader:
        raise UserError(f"{key}: expected a folder with files of {', '.join(LOADERS)}, got none in {path}")
    if len(by_loader) > 1:
        raise UserError(f"{key}: expected files of one kind, got {' and '.join(by_loader)} in {path}")
    [(loader, files)] = by_loader.items()
    return _load(datasets, loader, files, key, path)


def _from_hub(datasets: Any, path: str, name: str | None, key: str) -> Any:
    try:
        return datasets.load_dataset(path, name)
    except Exception as error:  # not found, no network, a configuration is missing
        raise UserError(f"{key}: {path} is no local file, and could not be had from the hub: {_deepest(error)}") from (
            error
        )


def _one_split(datasets: Any, rows: Any, split: str, key: str) -> Any:
    if not isinstance(rows, datasets.DatasetDict):
        return rows
    if split not in rows:
        near = difflib.get_close_matches(split, list(rows), n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{key}: expected one of {', '.join(rows)}, got {split!r}{hint}")
    return rows[split]


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix.lower() in LOADERS


def _near(path: Path) -> str:
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.with_name(near[0])}?" if near else ""


def _wrong_json(file: str) -> str | None:
    """Where and why a file of one JSON object a line is none."""
    if not file.endswith(("jsonl", "ndjson")):
        return None
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                return f"{file}, line {number}: not valid JSON: {error.msg} at column {error.colno}"
            if not isinstance(row, dict):
                return f"{file}, line {number}: expected a JSON object, got {type(row).__name__}"
    return None


def _deepest(error: BaseException) -> str:
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return " ".join(str(error).split())[:300] or type(error).__name__
