"""Rows from a file, a folder or the hub, as a `datasets.Dataset`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError
from fastpeft.hints import did_you_mean, nearest
from fastpeft.hub import unreachable
from fastpeft.integrations.datasets import opened_columns, without_network
from fastpeft.requirements import require

from .json_files import wrong_line
from .tables import csv_options
from .untrusted import check_files, check_saved

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
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Words in the names of a folder's files, and the split that each means, as `datasets` has them."""


def load_rows(
    path: str,
    *,
    split: str | None,
    name: str | None = None,
    key: str = "data.path",
    split_key: str = "",
    label: str = "label",
) -> Any:
    """Rows as `datasets` gives them.

    Args:
        path: a file of LOADERS, a folder of such files or saved by `datasets`, or a data set's ID on the hub.
        split: which split; None for "train", or for all where there are none or only one.
        name: which of a hub data set's configurations.
        key, split_key: the configuration's names for path and split, for messages.
        label: a table's column of classes, which may be numbers; its other columns are text.

    Returns:
        A `datasets.Dataset`; a text file is one row with the column `text`. Columns of pictures, sound and the like are
        left out: to read such a row would open the files and addresses that it names.

    Raises:
        UserError: there is no such thing, it cannot be read, or it is empty.
        MissingExtraError: `datasets` is not installed.
    """
    datasets = require("train", "datasets", "reading data")
    split_key = split_key or key.replace("path", "split")
    local = Path(path).expanduser()
    if local.is_file():
        rows = _from_file(datasets, local, key, label)
    elif local.is_dir():
        rows = _from_folder(datasets, local, split, key, split_key, label)
    elif _looks_local(path):
        raise UserError(f"{key}: expected a file, a folder or a hub ID, got {path}, which is not there{_near(local)}")
    else:
        rows = _from_hub(datasets, path, name, key)
    if name is not None and local.exists():
        raise UserError(f"data.name: expected null for what is no data set on the hub, got {name!r}")
    rows = _one_split(datasets, rows, split, split_key, path)
    rows = rows.remove_columns(opened_columns(rows))
    if len(rows) == 0:
        raise UserError(f"{key}: expected at least one row, got none in {path}")
    return rows


def is_document(path: str) -> bool:
    """Whether rows of `path` are whole texts, to be divided rather than cut."""
    local = Path(path).expanduser()
    if local.is_dir():
        found = _data_files(local)
        return bool(found) and all(file.suffix.lower() in DOCUMENTS for file in found)
    return local.suffix.lower() in DOCUMENTS


def _from_file(datasets: Any, path: Path, key: str, label: str) -> Any:
    loader = LOADERS.get(path.suffix.lower())
    if loader is None:
        raise UserError(f"{key}: expected one of {', '.join(LOADERS)}, got {path.name}")
    if path.stat().st_size == 0:
        raise UserError(f"{key}: expected at least one row, got an empty file: {path}")
    return _load(datasets, loader, [str(path)], key, path, label)


def _load(datasets: Any, loader: str, files: list[str], key: str, path: Path, label: str) -> Any:
    options: dict[str, Any] = {}
    check_files(files, loader, key)
    if loader == "text":  # of any length, so that no more than one is in memory before it is written
        options = {"sample_by": "document", "writer_batch_size": 1}
    try:
        if loader == "csv":
            options = csv_options(datasets, files, key, label)
        with without_network():
            rows = datasets.load_dataset(loader, data_files=files, split="train", **options)
        if loader == "parquet":  # its text may be any bytes, which fails when a row is looked at
            rows.data.validate(full=True)
        return rows
    except UserError:
        raise
    except Exception as error:  # pyarrow's, pandas' and datasets' own, by the format
        if "corresponds to no data" in str(error):
            raise UserError(f"{key}: expected at least one row, got none in {path}") from error
        reason = next((found for file in files if (found := wrong_line(file))), None) if loader == "json" else None
        raise UserError(f"{key}: {reason or f'{path} cannot be read as {loader}: {_deepest(error)}'}") from error


def sources(path: str, split: str | None) -> set[str]:
    """What rows come from, in words that can be compared: files, or a data set and its split."""
    local = Path(path).expanduser()
    if local.is_file():
        return {str(local.resolve())}
    if not local.is_dir():
        return {f"{path}, {split or 'train'}"}
    if _saved_by_datasets(local):
        return {f"{local.resolve()}, {split or 'train'}"}
    parts = _parts(local, _data_files(local), "")
    wanted = parts.get(split or "train") or next(iter(parts.values()), [])
    return {str(file.resolve()) for file in wanted}


def _saved_by_datasets(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in ("dataset_dict.json", "state.json"))


def _from_folder(datasets: Any, path: Path, split: str | None, key: str, split_key: str, label: str) -> Any:
    """A `Dataset`, or a `DatasetDict` with the wanted split."""
    if _saved_by_datasets(path):
        check_saved(path, key)
        try:
            return datasets.load_from_disk(str(path))
        except Exception as error:
            raise UserError(f"{key}: {path} cannot be read as saved by datasets: {_deepest(error)}") from error
    files = _data_files(path)
    if not files:
        raise UserError(f"{key}: expected a folder with files of {', '.join(LOADERS)}, got none in {path}")
    kinds = {"tsv" if file.suffix.lower() == ".tsv" else LOADERS[file.suffix.lower()]: None for file in files}
    if len(kinds) > 1:
        raise UserError(f"{key}: expected files of one kind, got {' and '.join(kinds)} in {path}")
    parts = _parts(path, files, key)
    name = _pick(parts, split, split_key) if "" not in parts else ""
    rows = _load(datasets, LOADERS[files[0].suffix.lower()], [str(file) for file in parts[name]], key, path, label)
    return datasets.DatasetDict({name: rows}) if name else rows


def _parts(folder: Path, files: list[Path], key: str) -> dict[str, list[Path]]:
    """A folder's files by split; all of them under "" where none but the training split has a name."""
    named: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", file.stem.lower())
        named.setdefault(next((SPLITS[word] for word in words if word in SPLITS), ""), []).append(file)
    if not named.keys() - {"", "train"}:
        return {"": files}
    if "" in named:
        held = next(files[0] for name, files in named.items() if name not in ("", "train"))
        raise UserError(
            f"{key}: expected files that are all named after a split, or none, got {named[''][0].name} beside "
            f"{held.name} in {folder}"
        )
    return named


def _data_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in LOADERS and file.is_file())
    return [file for file in files if file.name.lower() != "readme.md"]


def _from_hub(datasets: Any, path: str, name: str | None, key: str) -> Any:
    offline = unreachable()
    try:
        with without_network(offline is not None):  # what was fetched earlier will do then
            return datasets.load_dataset(path, name)
    except Exception as error:  # not found, a configuration is missing, no network
        made = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = offline or f"could not be had from the hub: {_deepest(error) if made else _line(error)}"
        raise UserError(f"{key}: {path} is no local file, and {reason}") from error


def _one_split(datasets: Any, rows: Any, split: str | None, key: str, path: str) -> Any:
    if not isinstance(rows, datasets.DatasetDict):
        if split not in (None, "train"):
            raise UserError(f"{key}: expected none, because {path} has no splits, got {split!r}")
        return rows
    return rows[_pick(rows, split, key)]


def _pick(splits: Iterable[str], split: str | None, key: str) -> str:
    names = list(splits)
    if split is None and len(names) == 1:
        return names[0]
    split = split or "train"
    if split not in names:
        raise UserError(f"{key}: expected one of {', '.join(names)}, got {split!r}{did_you_mean(split, names)}")
    return split


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix.lower() in LOADERS


def _near(path: Path) -> str:
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, names)
    return f"; did you mean {path.with_name(near)}?" if near else ""


def _deepest(error: BaseException) -> str:
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return _line(error)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
