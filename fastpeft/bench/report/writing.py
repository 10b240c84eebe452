"""All files of the report, written or compared with what lies there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..reading import read
from .figures import figures
from .growth import growths
from .page import page
from .rows import rows
from .site import site

FOLDER = "assets/benchmarks"
_CREATOR = re.compile(rb"<dc:title>(Matplotlib [^<]*)</dc:title>")


def report(results: str | os.PathLike[str]) -> dict[str, bytes]:
    """Every file of the report, by its path below the documentation's folder.

    Args:
        results: folder of records, one sub-folder a machine.

    Raises:
        FileNotFoundError, ValueError: as `fastpeft.bench.reading.read`.
        MissingExtraError: Matplotlib is not installed.
    """
    files = read(results)
    every, lines = rows(files), growths(files)
    pictures = figures(every, lines)
    return {
        "benchmarks.md": page(files, every, pictures, lines).encode(),
        f"{FOLDER}/index.html": site(files, every).encode(),
        **{f"{FOLDER}/{each.name}": each.data for each in pictures},
    }


def write(made: dict[str, bytes], docs: str | os.PathLike[str]) -> None:
    """Write the files of `report`; pictures that it no longer makes are removed."""
    for name, data in made.items():
        path = Path(docs, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for name in _pictures(docs) - set(made):
        Path(docs, name).unlink()


def stale(made: dict[str, bytes], docs: str | os.PathLike[str]) -> list[str]:
    """Files that are missing, different or no longer made. What another version of Matplotlib drew is not compared."""
    different = []
    for name, data in made.items():
        path = Path(docs, name)
        lies = path.read_bytes() if path.is_file() else b""
        if lies != data and not (lies and _CREATOR.findall(lies) != _CREATOR.findall(data)):
            different.append(name)
    return different + sorted(_pictures(docs) - set(made))


def _pictures(docs: str | os.PathLike[str]) -> set[str]:
    return {f"{FOLDER}/{path.name}" for path in Path(docs, FOLDER).glob("*.svg")}
