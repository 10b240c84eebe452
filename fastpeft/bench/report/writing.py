"""All files of the report, written or compared with what lies there."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..reading import read
from .figures import Figure, figures
from .growth import growths
from .page import page
from .rows import rows
from .site import site

FOLDER = "assets/benchmarks"
_CREATOR = re.compile(rb"<dc:title>(Matplotlib [^<]*)</dc:title>")


@dataclass(frozen=True)
class Report:
    """All of it: texts by their path below the documentation's folder, and pictures, which are not drawn yet."""

    texts: dict[str, str]
    pictures: list[Figure]


def report(results: str | os.PathLike[str]) -> Report:
    """The report of a folder of records, one sub-folder a machine.

    Raises:
        FileNotFoundError, ValueError: as `fastpeft.bench.reading.read`.
    """
    files = read(results)
    every, lines = rows(files), growths(files)
    pictures = figures(every, lines)
    texts = {"benchmarks.md": page(files, every, pictures, lines), f"{FOLDER}/index.html": site(files, every)}
    return Report(texts, pictures)


def write(made: Report, docs: str | os.PathLike[str]) -> int:
    """Write all files, remove pictures that are no longer made; returns how many were written.

    Raises:
        MissingExtraError: Matplotlib is not installed; nothing is written then.
    """
    data = {name: text.encode() for name, text in made.texts.items()}
    data |= {f"{FOLDER}/{each.name}": each.svg() for each in made.pictures}
    for name, content in data.items():
        path = Path(docs, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for name in _pictures(docs) - set(data):
        Path(docs, name).unlink()
    return len(data)


def stale(made: Report, docs: str | os.PathLike[str], draw: bool = True) -> list[str]:
    """Files that are missing, different or no longer made.

    Args:
        made: the report as it should be.
        docs: the documentation's folder.
        draw: compare pictures too, where this version of Matplotlib drew them; otherwise only their names.
    """
    different = [name for name, text in made.texts.items() if _content(docs, name) != text.encode()]
    names = {f"{FOLDER}/{each.name}": each for each in made.pictures}
    different += sorted(_pictures(docs) ^ set(names))
    for name in sorted(_pictures(docs) & set(names)) if draw else ():
        lies, drawn = _content(docs, name), names[name].svg()
        if lies != drawn and _CREATOR.findall(lies) == _CREATOR.findall(drawn):
            different.append(name)
    return different


def _content(docs: str | os.PathLike[str], name: str) -> bytes:
    path = Path(docs, name)
    return path.read_bytes() if path.is_file() else b""


def _pictures(docs: str | os.PathLike[str]) -> set[str]:
    return {f"{FOLDER}/{path.name}" for path in Path(docs, FOLDER).glob("*.svg")}
