"""Where something can be written."""

from __future__ import annotations

import tempfile
from pathlib import Path


def can_be_made(path: Path) -> bool:
    """Whether a file or folder of this name can be made, and files in it. Leaves nothing behind."""
    above = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=above):  # permissions do not tell: root has them all, in /proc too
            return True
    except OSError:
        return False
