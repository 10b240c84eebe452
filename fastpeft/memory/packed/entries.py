"""The entries of the packed cache: where they are, which belongs to a checkpoint, what there is, and clearing them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIX = ".safetensors"
UNFINISHED = ".tmp"
MANIFEST = "manifest.json"
LOCK = "lock"
FORMAT = 1
"""Of keys, files and manifests; an entry of another one is never looked at."""
_HEADER = 100 << 20  # safetensors refuses longer ones
_SAMPLES, _SAMPLE = 16, 64 << 10
_CONTENT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
"""How the hub's cache names a file: by git's SHA-1, or by SHA-256."""


@dataclass(frozen=True)
class Entry:
    """One checkpoint, packed in one way.

    Attributes:
        folder: where it lies.
        source: the checkpoint, as it was named first.
        packing: how it was packed, as in "nf4, double quantisation, bfloat16, cuda".
        finished: whether all of it is there.
        bytes: on disk.
        used: when it was last written or read, in seconds since 1970.
    """

    folder: Path
    source: str
    packing: str
    finished: bool
    bytes: int
    used: float


def user_folder() -> Path:
    """`fastpeft/packed` in the user's cache folder, as the system has it (`~/.cache` on Linux, or XDG_CACHE_HOME)."""
    from platformdirs import user_cache_path

    return user_cache_path("fastpeft", appauthor=False) / "packed"


def key_of(files: Iterable[str | Path], settings: Mapping[str, Any]) -> str:
    """The name of the entry for these files, packed with these settings (JSON)."""
    sources = [_identity(Path(file)) for file in files]
    return hashlib.sha256(json.dumps([FORMAT, sources, dict(settings)], sort_keys=True).encode()).hexdigest()[:40]


def entries(folder: Path | None = None) -> list[Entry]:
    """What lies in a cache folder, the user's if None; what was used last comes first."""
    found = []
    for manifest in (folder or user_folder()).glob(f"*/{MANIFEST}"):
        with suppress(OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
            about = json.loads(manifest.read_text(encoding="utf-8"))
            size = sum(path.lstat().st_size for path in manifest.parent.iterdir())
            facts = str(about["source"]), str(about["packing"]), about.get("finished") is True
            found.append(Entry(manifest.parent, *facts, size, manifest.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def clear(entry: Entry) -> bool:
    """Delete an entry's files; False where a process is writing it."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(entry.folder / LOCK, timeout=0):
            for pattern in (MANIFEST, f"*{SUFFIX}", f"*{UNFINISHED}"):
                for path in entry.folder.glob(pattern):
                    path.unlink(missing_ok=True)
            with suppress(PermissionError):  # Windows deletes no open file
                (entry.folder / LOCK).unlink(missing_ok=True)  # while held: who waits for it begins with a new one
    except Timeout:
        return False
    with suppress(OSError):  # not empty: other files than ours
        entry.folder.rmdir()
    return True


def _identity(file: Path) -> list[Any]:
    """What tells a file's content from another's without reading all of it.

    Name, size, header and samples. The hub's cache names files by their content as well; of others the times, that of
    the last change among them, which no tool can set back.
    """
    real = file.resolve()
    facts, digest = real.stat(), hashlib.sha256()
    with open(real, "rb") as opened:
        start = opened.read(8)
        digest.update(start + opened.read(min(int.from_bytes(start, "little"), _HEADER)))
        for sample in range(_SAMPLES):
            opened.seek(sample * max(facts.st_size - _SAMPLE, 0) // (_SAMPLES - 1))
            digest.update(opened.read(_SAMPLE))
    hub = real.parent.name == "blobs" and real != file and _CONTENT.fullmatch(real.name)
    known = [real.name] if hub else [facts.st_mtime_ns, facts.st_ctime_ns]
    return [file.name, facts.st_size, digest.hexdigest(), *known]
