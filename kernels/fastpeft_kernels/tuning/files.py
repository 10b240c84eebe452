"""Where choices are kept: a file for each device in the user's cache folder, and files that come with the package."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..common.private import others_may_write, private_folder
from .records import UnusableError, Winner, from_text, to_text

LARGEST = 4 << 20
"""Bytes of a file that is read; ten thousand winners take less."""
LOCK_TIMEOUT_S = 30

SHIPPED = Path(__file__).with_name("defaults")
"""Measured by `make gpu`. They serve whatever versions of torch and Triton are there: what was fastest with others is a
better guess than none, and a choice changes no result beyond rounding."""


def user_folder() -> Path:
    """`fastpeft/tuning` in the user's cache folder, as the system has it (`~/.cache` on Linux, or XDG_CACHE_HOME)."""
    from platformdirs import user_cache_path

    return user_cache_path("fastpeft", appauthor=False) / "tuning"


def file_of(device: str, folder: Path) -> Path:
    """The file for a device's name: "NVIDIA H200" is in nvidia-h200.json."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")[:100] + ".json")


def read(path: Path, device: str) -> list[Winner]:
    """The winners in a file; none where there is no file.

    Raises:
        UnusableError: it cannot be used, for whatever reason.
    """
    try:
        if not path.exists():
            return []
        if not path.is_file():
            raise UnusableError("not a file")
        if path.parent != SHIPPED and (reason := others_may_write(path.parent) or others_may_write(path)):
            raise UnusableError(f"expected a file and a folder that only this user may write, got one {reason}")
        if (size := path.stat().st_size) > LARGEST:
            raise UnusableError(f"expected at most {LARGEST} bytes, got {size}")
        return from_text(path.read_text(encoding="utf-8"), device, any_versions=path.parent == SHIPPED)
    except UnusableError:
        raise
    except Exception as error:  # whatever a file holds, it must not end a training step
        raise UnusableError(f"{type(error).__name__}: {error}") from error


def add(path: Path, device: str, winners: Iterable[Winner]) -> None:
    """Put winners into a file beside those of other cases; what cannot be used of it is replaced.

    Other processes may do the same at the same time: nothing is lost, and whoever reads finds a whole file.

    Raises:
        OSError: it cannot be written, others may write there, or another process keeps the lock for half a minute.
    """
    from filelock import FileLock

    path = private_folder(path.parent) / path.name
    with FileLock(path.with_suffix(".lock"), timeout=LOCK_TIMEOUT_S):
        try:
            kept = read(path, device)
        except UnusableError:
            kept = []
        merged = {(winner.op, winner.case): winner for winner in [*kept, *winners]}
        for left in path.parent.glob(f".{path.name}-*.tmp"):  # of a process that was killed: we hold the lock
            left.unlink(missing_ok=True)
        handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(to_text(device, merged.values()))
            os.replace(unfinished, path)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
