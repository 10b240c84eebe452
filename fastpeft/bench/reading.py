"""What everyone who reads records needs: the files of a folder, where they were measured, the ratio of two peers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from .records import Environment, Record, load

AGAIN = " again"
"""Ends the name of a peer that is measured a second time, to show the noise."""


def read(path: str | os.PathLike[str]) -> dict[str, list[Record]]:
    """All records of a file, or of a folder and those below it, by file.

    Args:
        path: a file of records, or a folder; in a folder all that end in .jsonl are read, in the order of their names.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a folder without such files, and files that are empty or hold a line that is no record; the message
            names all of them.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file of records or a folder with some, got nothing")
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: expected a folder with files of records, *.jsonl, got none")
    found: dict[str, list[Record]] = {}
    wrong = []
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        beside = f"{file.parent.name}/" if file.parent.name else ""
        try:
            found[name] = load(file)
        except ValueError as error:
            wrong.append(f"{beside}{error}")
        except OSError as error:
            wrong.append(f"{beside}{file.name}: {error.strerror}")
        else:
            if not found[name]:
                wrong.append(f"{beside}{file.name}: expected records, got an empty file")
    if wrong:
        raise ValueError("\n".join(wrong))
    return found


def place(records: Sequence[Record]) -> Environment:
    """Where all the records were measured.

    Raises:
        ValueError: in more than one place, with more than one set of versions, or there are none.
    """
    places = {
        (r.environment.device, r.environment.commit, tuple(sorted(r.environment.versions.items()))) for r in records
    }
    if len(places) != 1:
        raise ValueError(f"records: expected one run on one machine, got {len(places)}")
    return records[0].environment


def versions(where: Environment, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {where.versions[name]}" for name in names if name in where.versions)


def median_ratio(of: Iterable[float], to: Iterable[float]) -> float:
    """Median over rounds of one sample divided by the other."""
    return median(a / b for a, b in zip(of, to, strict=True))


def time_ratio(ours: Record, theirs: Record) -> float:
    """`median_ratio` of two records."""
    return median_ratio(ours.samples, theirs.samples)


def kind_of(record: Record) -> str | None:
    """ "time", "memory" or "rate" by the unit; None for shares, counts and marks."""
    if record.unit in ("s", "ms", "us"):
        return "time"
    if record.unit in ("B", "MiB", "GiB"):
        return "memory"
    return "rate" if record.unit.endswith("/s") else None


def setting(record: Record, name: str) -> str:
    """A setting that is a word or a number, as text; "" where there is none."""
    value = record.settings.get(name, "")
    return str(value).removeprefix("torch.") if isinstance(value, (str, int, float)) else ""


def numeric(record: Record, name: str) -> float | None:
    """A setting that is a finite number; None where it is something else or not there."""
    value = record.settings.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def least_seconds(flops: float, moved: float, matrix: float, copy: float) -> float | None:
    """max(operations / matrix rate, bytes / copy rate), with rates in TFLOP/s and GB/s.

    None where there is neither, or no rate of what there is.
    """
    if (flops and matrix <= 0) or (moved and copy <= 0):
        return None
    seconds = max(flops / (matrix * 1e12) if flops else 0.0, moved / (copy * 1e9) if moved else 0.0)
    return seconds if seconds > 0 else None
