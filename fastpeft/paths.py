"""Paths: absolute ones, where something can be written, and files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def absolute(name: str) -> str:
    """A local path from the root, so that it means the same from anywhere; what is not there, a hub ID, as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def can_be_made(path: Path) -> bool:
    """Whether a file or folder of this name can be made, and files in it. Leaves nothing behind."""
    above = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=above):  # permissions do not tell: root has them all, in /proc too
            return True
    except OSError:
        return False


def write_whole(path: Path, text: str) -> None:
    """Put a text into a file in one piece: whoever reads finds all of it or what was there before, after a crash too.

    Raises:
        OSError: it cannot be written. What was there before is there still.
    """
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o666 & ~umask())
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise
    settle(path.parent)


def settle(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can say so."""
    with contextlib.suppress(OSError):  # a folder is no file on Windows
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def umask() -> int:
    """Which permissions a new file of this process does not get."""
    found = os.umask(0o022)
    os.umask(found)
    return found
