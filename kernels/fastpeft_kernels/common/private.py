"""Folders of this user alone, for what is loaded as code or believed: nobody else may put anything there."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def private_folder(folder: Path) -> Path:
    """The folder, made for this user alone if it is not there, by a path without links: those may be led elsewhere.

    Raises:
        PermissionError: somebody else could change what is in it, or put another in its place.
        OSError: it cannot be made.
    """
    if not folder.is_dir():
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    named, folder = folder, folder.resolve()
    if reason := others_may_write(folder):
        raise PermissionError(f"{named}: expected a folder that only this user may write, got one {reason}")
    for above in folder.parents:
        facts = os.stat(above)
        shared = facts.st_mode & stat.S_IWOTH and not facts.st_mode & stat.S_ISVTX  # /tmp keeps others' names
        if shared or (above == folder.parent and not _ours(facts)):
            raise PermissionError(f"{named}: expected it in folders where nobody else may rename it, got {above}")
    return folder


def others_may_write(path: Path) -> str | None:
    """How somebody beside this user and root may change a file, or the names in a folder; None where nobody may.

    Raises:
        OSError: it cannot be looked at.
    """
    facts = os.stat(path)
    if not _ours(facts):
        return f"of user {facts.st_uid}"
    if os.name == "posix" and facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"of mode {stat.S_IMODE(facts.st_mode):o}"
    return None


def _ours(facts: os.stat_result) -> bool:
    return os.name != "posix" or facts.st_uid in (0, os.geteuid())
