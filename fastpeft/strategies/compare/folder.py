"""The folder of a comparison: the plan, and a line for each trial that ended."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastpeft.errors import UserError
from fastpeft.paths import can_be_made
from fastpeft.structured import convert
from fastpeft.training.folder import flat

PLAN, TRIALS, RESULTS, REPORT, FIGURE, TRAINED = (
    *("plan.json", "trials.jsonl", "results.json", "report.md", "comparison.svg"),
    "trained",
)


def check(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise UserError if a comparison may not begin or go on in a folder; changes nothing."""
    if resume and overwrite:
        raise UserError("--resume: expected it without --overwrite, got both")
    if not can_be_made(folder) or (folder.exists() and not folder.is_dir()):
        raise UserError(f"training.output_dir: expected a folder that can be written, got {folder}")
    there = (folder / PLAN).is_file()
    if resume and not there:
        raise UserError(f"--resume: expected a comparison in training.output_dir, got none in {folder}")
    if not there and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"training.output_dir: expected a comparison's folder or a new one, got {folder}")
    if there and not (resume or overwrite):
        raise UserError(
            f"training.output_dir: {folder} holds a comparison already: --resume goes on with it, "
            "--overwrite replaces it"
        )


def begin(folder: Path, plan: dict[str, Any], *, overwrite: bool) -> list[dict[str, Any]]:
    """The results that are there already.

    Raises:
        UserError: they are of another plan.
    """
    if overwrite:
        clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN
    if not path.is_file():
        path.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        return []
    try:
        before = flat(convert(dict[str, Any], json.loads(path.read_text(encoding="utf-8")), "plan"))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--resume: {path} cannot be read: {error}") from error
    now = flat(json.loads(json.dumps(plan)))
    for key in before | now:
        if before.get(key) != now.get(key):
            name = key.removeprefix("config.")
            name = f"strategy.{key}" if key.startswith("options.") else name
            raise UserError(
                f"{name}: expected {before.get(key)!r}, as the comparison to resume has it, got {now.get(key)!r}"
            )
    return read(folder)


def read(folder: Path) -> list[dict[str, Any]]:
    """Results of the trials that ended; a line that a kill cut short, or that is no result, is left out."""
    path = folder / TRIALS
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    found = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            if isinstance(result := json.loads(line), dict):
                found.append(result)
    return found


def append(folder: Path, result: dict[str, Any]) -> None:
    """One line, in one write; on a line of its own even after one that was cut short."""
    with open(folder / TRIALS, "ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            whole = file.read(1) == b"\n"
        else:
            whole = True
        file.write(("" if whole else "\n").encode() + json.dumps(result, allow_nan=False).encode() + b"\n")


def clear(folder: Path) -> None:
    """Delete what a comparison left, and nothing else."""
    for name in (PLAN, TRIALS, RESULTS, REPORT, FIGURE):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / TRAINED, ignore_errors=True)
